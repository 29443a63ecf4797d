//! How well a model says what its samples' answers are, and how far it is from another that read the same.
use crate::samples::Sample;
use crate::teach::{Arrays, Lesson, TeachError};
use graphs::interpret::{Array, Caches, InterpretError, Interpreter, Values};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ScoreError {
    #[error(transparent)]
    Teach(#[from] TeachError),
    #[error("cannot keep the unquantized model's logits in the folder for temporary files")]
    Baseline(#[from] std::io::Error),
}

impl ScoreError {
    pub fn hint(&self) -> Option<String> {
        match self {
            ScoreError::Baseline(_) => Some("set TMPDIR to a folder with room".into()),
            ScoreError::Teach(_) => None,
        }
    }
}

/// Over all tokens of all answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    pub perplexity: f64,
    pub divergence: Divergence,
    pub tokens: usize,
}

/// Kullback-Leibler divergences of the next tokens' distributions from the baseline's. A few tokens that were near ties can
/// make most of a mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Divergence {
    pub mean: f64,
    pub median: f64,
    /// Exceeded by at most one token in a hundred.
    pub percentile_99: f64,
}

impl Divergence {
    fn of(mut tokens: Vec<f64>) -> Divergence {
        tokens.sort_by(f64::total_cmp);
        let mean = tokens.iter().sum::<f64>() / tokens.len().max(1) as f64;
        let at = |percent: usize| tokens.get(tokens.len() * percent / 100).copied().unwrap_or(0.0);
        Divergence { mean, median: at(50), percentile_99: at(99) }
    }
}

/// Logits of the first model that was scored, in a file: those of a large vocabulary do not fit in memory.
pub struct Baseline {
    file: File,
    written: bool,
}

impl Baseline {
    /// # Errors
    /// No temporary file can be made.
    pub fn new() -> Result<Baseline, ScoreError> {
        Ok(Baseline { file: tempfile::tempfile()?, written: false })
    }

    /// The baseline's row of these logits: themselves, while it is written.
    fn row(&mut self, logits: &[f32]) -> std::io::Result<Vec<f32>> {
        if self.written {
            let mut bytes = vec![0; logits.len() * 4];
            self.file.read_exact(&mut bytes)?;
            return Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect());
        }
        self.file.write_all(&logits.iter().flat_map(|logit| logit.to_le_bytes()).collect::<Vec<_>>())?;
        Ok(logits.to_vec())
    }
}

/// Scores the samples under a model; the first model given is what the later ones are compared with.
///
/// # Errors
/// Samples that do not fit, weights that cannot be read, no room for the baseline.
pub fn score(
    lesson: &Lesson<'_>,
    values: &dyn Values,
    samples: &[Sample],
    baseline: &mut Baseline,
    progress: &dyn Fn(u64, u64),
) -> Result<Scores, ScoreError> {
    let mut interpreters = BTreeMap::new();
    let seeing = samples.iter().any(|sample| !sample.pictures.is_empty());
    for network in lesson.networks.iter().filter(|network| network.name != "vision" || seeing) {
        let interpreter = Interpreter::new((*network).clone(), values).map_err(TeachError::from)?;
        interpreters.insert(network.name.as_str(), interpreter);
    }
    let mut run = |name: &str, inputs: Vec<Arrays>| -> Result<Vec<Arrays>, InterpretError> {
        let Some(interpreter) = interpreters.get(name) else { return Ok(inputs) };
        let run = |inputs: Arrays| {
            let tokens = inputs.get("input_ids").and_then(|ids| ids.shape.get(1)).copied().unwrap_or(0);
            interpreter.run(&inputs, &mut Caches::new(interpreter.network(), 1, tokens), None)
        };
        inputs.into_iter().map(run).collect()
    };
    baseline.file.seek(SeekFrom::Start(0))?;
    let (mut surprises, mut divergences) = (0.0, Vec::new());
    for (number, sample) in samples.iter().enumerate() {
        let logits = lesson.teach(std::slice::from_ref(sample), &mut run)?;
        for logits in &logits {
            for (row, token) in lesson.scored(sample) {
                let own = row_of(logits, row).ok_or(TeachError::Inconsistent("language"))?;
                let wanted = baseline.row(own)?;
                surprises += surprise(own, token as usize);
                divergences.push(divergence(&wanted, own));
            }
        }
        progress(number as u64 + 1, samples.len() as u64);
    }
    baseline.written = true;
    let tokens = divergences.len();
    let perplexity = (surprises / tokens.max(1) as f64).exp();
    Ok(Scores { perplexity, divergence: Divergence::of(divergences), tokens })
}

fn row_of(logits: &Array, row: usize) -> Option<&[f32]> {
    let width = *logits.shape.last()?;
    logits.floats().ok()?.get(row * width..(row + 1) * width)
}

/// Logarithm of the sum of exponentials.
fn normalizer(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    largest + logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum::<f64>().ln()
}

/// Negative log-likelihood of one token.
fn surprise(logits: &[f32], token: usize) -> f64 {
    normalizer(logits) - f64::from(logits.get(token).copied().unwrap_or(f32::NEG_INFINITY))
}

/// Kullback-Leibler divergence of what `found` says from what `wanted` does.
fn divergence(wanted: &[f32], found: &[f32]) -> f64 {
    let (of_wanted, of_found) = (normalizer(wanted), normalizer(found));
    let term = |(&wanted, &found): (&f32, &f32)| {
        let (wanted, found) = (f64::from(wanted) - of_wanted, f64::from(found) - of_found);
        wanted.exp() * (wanted - found)
    };
    std::iter::zip(wanted, found).map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_the_negative_log_of_the_softmax() {
        let logits = [1.0f32, 2.0, 4.0];
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        assert!((surprise(&logits, 1) + (2.0f64.exp() / total).ln()).abs() < 1e-6);
    }

    #[test]
    fn one_token_in_a_hundred_exceeds_the_percentile() {
        let tokens = (0..200).rev().map(f64::from).collect();
        assert_eq!(Divergence::of(tokens), Divergence { mean: 99.5, median: 100.0, percentile_99: 198.0 });
        assert_eq!(Divergence::of(vec![3.0]), Divergence { mean: 3.0, median: 3.0, percentile_99: 3.0 });
        assert_eq!(Divergence::of(Vec::new()), Divergence::default());
    }

    #[test]
    fn divergence_is_that_of_the_softmaxes() {
        let (p, q) = ([0.5f64, 0.3, 0.2], [0.1f64, 0.6, 0.3]);
        let logits = |of: [f64; 3], shift: f32| of.map(|value| value.ln() as f32 + shift);
        let wanted: f64 = std::iter::zip(p, q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((divergence(&logits(p, 3.0), &logits(q, -2.0)) - wanted).abs() < 1e-6);
        assert!(divergence(&logits(p, 1.0), &logits(p, 7.0)).abs() < 1e-6, "a shift of all logits is nothing");
    }
}

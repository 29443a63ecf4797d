//! An engine against the reference: the same random input through both, results compared one by one.
use crate::engine_dir::EngineConfig;
use crate::passes::MARK;
use crate::random::{STEP, mix};
use crate::runtime::{Executor, Output, RuntimeError};
use graphs::DType;
use serde::Serialize;
use std::collections::BTreeMap;

/// What is fed.
#[derive(Clone, Copy, Debug)]
pub struct Feed {
    pub seed: u64,
    pub batch: usize,
    /// Tokens of the longest prompt; each further one is a token shorter.
    pub input_len: usize,
    /// Decode steps after the prompt.
    pub steps: usize,
}

/// One result of a network, over all calls of a stage.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// `vision`, `prefill` or `decode`.
    pub stage: &'static str,
    pub result: String,
    /// ||engine - reference|| / ||reference|| over all calls.
    pub relative_error: f64,
    /// The same of the call where it was largest.
    pub worst_call: f64,
    /// What the reference differs by, over all calls, if each of its results is rounded to the engine's type: no engine of
    /// that type can be expected to differ by less. 0 in float32, but for INT8 inputs, which even its last bits decide.
    pub rounding_error: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    pub comparisons: Vec<Comparison>,
    /// Greedy choices, and how many of them were the same.
    pub choices: usize,
    pub equal_choices: usize,
}

/// How many times the error of rounding alone an engine may be off: it rounds inside of nodes too, and in another order.
const ROUNDINGS: f64 = 3.0;

impl Verification {
    /// The largest relative error allowed of one result, where `bound` is that of a network of ordinary sensitivity. Prompt
    /// and steps of one result are as sensitive as each other, and each stage's rounding is one draw: the larger counts.
    pub fn bound(&self, result: &str, bound: f64) -> f64 {
        let same = self.comparisons.iter().filter(|one| one.result == result);
        same.fold(bound, |bound, one| bound.max(ROUNDINGS * one.rounding_error))
    }
}

/// The largest relative error that an engine of a type may have where rounding costs less than a third of it. Where inputs
/// are rounded to INT8, the last bit of any type decides to which side, and one of them moves all that follows.
pub fn bound(dtype: DType, quantized_inputs: bool) -> f64 {
    match dtype {
        DType::Float32 | DType::Float16 if quantized_inputs => 2e-2,
        DType::Float32 => 1e-3,
        DType::Float16 => 1e-2,
        _ => 6e-2,
    }
}

/// Runs both and compares. The reference's choices are fed to both, so that one near tie does not end the comparison.
///
/// # Errors
/// What an executor refuses, or results that do not belong together.
pub fn verify(
    engine: &mut dyn Executor,
    reference: &mut dyn Executor,
    mut rounded: Option<&mut (dyn Executor + 'static)>,
    config: &EngineConfig,
    feed: Feed,
) -> Result<Verification, RuntimeError> {
    let mut numbers = Numbers(feed.seed);
    let mut errors: BTreeMap<(&'static str, String), Errors> = BTreeMap::new();
    let mut compare = |stage,
                       engine: &mut dyn Executor,
                       reference: &mut dyn Executor,
                       rounded: Option<&mut (dyn Executor + 'static)>,
                       used: &[usize]| {
        let (found, wanted) = (engine.outputs()?, reference.outputs()?);
        let nearest = rounded.map(Executor::outputs).transpose()?;
        for (name, wanted) in &wanted {
            let missing = || RuntimeError::Inconsistent { what: format!("output `{name}`") };
            let of = |found: &BTreeMap<String, Output>| Error::of(found.get(name)?, wanted, used);
            let error = of(&found).ok_or_else(missing)?;
            let rounding = nearest.as_ref().map_or(Some(Error::default()), of).ok_or_else(missing)?;
            let errors = errors.entry((stage, name.clone())).or_default();
            errors.all.add(error);
            errors.rounding.add(rounding);
            // NaN is worse than any number.
            if error.relative().is_nan() || error.relative() > errors.worst {
                errors.worst = error.relative();
            }
        }
        Ok::<_, RuntimeError>(())
    };
    let mut features = 0;
    if let Some(multimodal) = config.pretrained_config.multimodal {
        let [height, width] = multimodal.image_size;
        let pixels: Vec<f32> = (0..feed.batch * 3 * height * width).map(|_| numbers.normal()).collect();
        engine.see(&pixels, feed.batch)?;
        reference.see(&pixels, feed.batch)?;
        if let Some(rounded) = &mut rounded {
            rounded.see(&pixels, feed.batch)?;
        }
        compare("vision", engine, reference, rounded.as_deref_mut(), &[])?;
        features = multimodal.num_visual_features;
    }
    let vocab = config.pretrained_config.vocab_size;
    let prompt = |request: usize, numbers: &mut Numbers| {
        let length = feed.input_len.saturating_sub(request).max(1);
        let pictured = if features < length { features } else { 0 };
        let row = |row: usize| (vocab + request * features + row) as i32;
        let mut ids = vec![numbers.below(vocab) as i32];
        ids.extend((0..pictured.min(length - 1)).map(row));
        let words = length - ids.len();
        ids.extend((0..words).map(|_| numbers.below(vocab) as i32));
        ids
    };
    let prompts: Vec<Vec<i32>> = (0..feed.batch).map(|request| prompt(request, &mut numbers)).collect();
    let used: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let mut found = engine.prefill(&prompts)?;
    let mut wanted = reference.prefill(&prompts)?;
    if let Some(rounded) = &mut rounded {
        rounded.prefill(&prompts)?;
    }
    compare("prefill", engine, reference, rounded.as_deref_mut(), &used)?;
    let mut choices = wanted.len();
    let mut equal_choices = equal(&found, &wanted);
    for _ in 0..feed.steps {
        engine.force(&wanted)?;
        reference.force(&wanted)?;
        if let Some(rounded) = &mut rounded {
            rounded.force(&wanted)?;
            rounded.decode(1)?;
        }
        let one = |steps: Vec<Vec<u32>>| steps.into_iter().next().unwrap_or_default();
        (found, wanted) = (one(engine.decode(1)?), one(reference.decode(1)?));
        compare("decode", engine, reference, rounded.as_deref_mut(), &vec![1; feed.batch])?;
        choices += wanted.len();
        equal_choices += equal(&found, &wanted);
    }
    let comparison = |((stage, result), errors): ((_, _), Errors)| Comparison {
        stage,
        result,
        relative_error: errors.all.relative(),
        worst_call: errors.worst,
        rounding_error: errors.rounding.relative(),
    };
    Ok(Verification { comparisons: errors.into_iter().map(comparison).collect(), choices, equal_choices })
}

impl Comparison {
    /// Whether it is a result inside a network, which was marked when it was built.
    pub fn is_mark(&self) -> bool {
        self.result.starts_with(MARK)
    }
}

fn equal(found: &[u32], wanted: &[u32]) -> usize {
    std::iter::zip(found, wanted).filter(|(found, wanted)| found == wanted).count()
}

/// Of one result, over all calls.
#[derive(Default)]
struct Errors {
    all: Error,
    worst: f64,
    rounding: Error,
}

/// Squared norms of a difference and of what was wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Error {
    difference: f64,
    size: f64,
}

impl Error {
    fn add(&mut self, other: Error) {
        self.difference += other.difference;
        self.size += other.size;
    }

    fn relative(self) -> f64 {
        (self.difference / self.size.max(f64::MIN_POSITIVE)).sqrt()
    }

    /// Over the tokens that count: `used` of each request, where the result has a row for each token.
    fn of(found: &Output, wanted: &Output, used: &[usize]) -> Option<Error> {
        if found.shape != wanted.shape || found.values.len() != wanted.values.len() {
            return None;
        }
        let longest = used.iter().copied().max().unwrap_or(0);
        let by_token = matches!(&wanted.shape[..], [batch, tokens, ..] if *batch == used.len() && *tokens == longest);
        let rows = if by_token { used.len() * longest } else { 1 };
        let width = (wanted.values.len() / rows.max(1)).max(1);
        let mut error = Error::default();
        let pairs = std::iter::zip(found.values.chunks(width), wanted.values.chunks(width));
        for (row, (found, wanted)) in pairs.enumerate() {
            if by_token && used.get(row / longest).is_some_and(|&used| row % longest >= used) {
                continue;
            }
            for (found, wanted) in std::iter::zip(found, wanted) {
                error.difference += f64::from(found - wanted).powi(2);
                error.size += f64::from(*wanted).powi(2);
            }
        }
        Some(error)
    }
}

/// One number after the other.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// Nearly normal: the sum of 12 uniform numbers has variance 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32).sum::<f32>() - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_and_skip_what_pads() {
        let output = |values: &[f32]| Output { shape: vec![2, 2, 1], values: values.to_vec() };
        let wanted = output(&[3.0, 4.0, 0.0, 9.0]);
        let relative = |found: &[f32]| Error::of(&output(found), &wanted, &[2, 1]).unwrap().relative();
        assert_eq!(relative(&[3.0, 4.0, 0.0, 9.0]), 0.0);
        // The last row pads the second request.
        assert_eq!(relative(&[3.0, 4.5, 0.0, -7.0]), 0.1);
        assert!(relative(&[f32::NAN, 4.0, 0.0, 9.0]).is_nan());
        assert_eq!(Error::of(&Output { shape: vec![4], values: vec![0.0; 4] }, &wanted, &[2, 1]), None);
    }

    #[test]
    fn what_rounding_costs_widens_the_bound() {
        let of = |stage, result: &str, rounding_error| Comparison {
            stage,
            result: result.into(),
            relative_error: 0.0,
            worst_call: 0.0,
            rounding_error,
        };
        let comparisons = vec![of("prefill", "logits", 0.5), of("decode", "logits", 0.1), of("vision", "output", 1e-3)];
        let found = Verification { comparisons, choices: 0, equal_choices: 0 };
        assert_eq!(["logits", "output"].map(|result| found.bound(result, 1e-2)), [1.5, 1e-2]);
        let bounds =
            [DType::Float32, DType::Float16, DType::Bfloat16].map(|dtype| [false, true].map(|q| bound(dtype, q)));
        assert_eq!(bounds, [[1e-3, 2e-2], [1e-2, 2e-2], [6e-2, 6e-2]]);
    }

    #[test]
    fn numbers_are_nearly_normal() {
        let mut numbers = Numbers(1);
        let values: Vec<f32> = (0..20000).map(|_| numbers.normal()).collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}

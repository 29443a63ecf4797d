//! Finds the vectors that passes named: factors first, then scales and ranges, which depend on them. Layers are searched
//! side by side; what is found does not depend on the number of threads.
use super::{Channels, Statistics, StatisticsError};
use graphs::{DType, Format, Weight};
use quant::awq::{self, Matrix};
use quant::{Entry, InputStatistics, MemorySource, Method, QuantError, Smoothed, Source, SourceError, materialize_f32};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Searches whose weights are in memory at once, as floats; each is itself spread over all threads.
const BESIDE: usize = 4;

/// A vector that is still to be found; `input` is the statistics' name of what the layers read.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// What the inputs of `members` are divided by and their weights multiplied.
    Factors {
        name: String,
        input: String,
        method: Method,
        channels: Channels,
        width: usize,
        members: Vec<(Weight, Format)>,
    },
    /// Scales of one layer's weights, that clip them; `input` and its factors where they weigh the loss.
    Scales { name: String, of: Weight, format: Format, input: Option<(String, Option<Weight>)> },
    /// The one scale of an INT8 input, which is divided by `factors`.
    Range { name: String, input: String, factors: Option<Weight> },
}

impl Wanted {
    pub fn name(&self) -> &str {
        match self {
            Wanted::Factors { name, .. } | Wanted::Scales { name, .. } | Wanted::Range { name, .. } => name,
        }
    }

    fn shape(&self) -> Vec<usize> {
        match self {
            Wanted::Factors { channels, width, .. } => vec![channels.own(*width)],
            Wanted::Scales { of, format, .. } => match of.shape()[..] {
                [out, input] => format.scale_shape(out, input),
                _ => Vec::new(),
            },
            Wanted::Range { .. } => vec![1],
        }
    }

    /// Name of the statistics that it needs.
    pub fn input(&self) -> Option<&str> {
        match self {
            Wanted::Factors { input, .. } | Wanted::Range { input, .. } => Some(input),
            Wanted::Scales { input, .. } => input.as_ref().map(|(input, _)| input.as_str()),
        }
    }
}

/// A checkpoint with the vectors found for it, which lie over it as tensors of their own.
pub struct Searched<'s> {
    base: &'s dyn Source,
    vectors: &'s Vectors,
}

/// Vectors by name: their shapes from the start, their values once they are found.
#[derive(Default)]
pub struct Vectors {
    shapes: BTreeMap<String, Vec<usize>>,
    values: MemorySource,
}

impl Vectors {
    pub fn new<'w>(wanted: impl Iterator<Item = &'w Wanted>) -> Vectors {
        let shapes = wanted.map(|wanted| (wanted.name().to_owned(), wanted.shape())).collect();
        Vectors { shapes, values: MemorySource::default() }
    }

    pub fn over<'s>(&'s self, base: &'s dyn Source) -> Searched<'s> {
        Searched { base, vectors: self }
    }

    /// Finds them all.
    ///
    /// # Errors
    /// Statistics that are missing, or weights that cannot be read.
    pub fn search(
        &mut self,
        wanted: &[&Wanted],
        base: &dyn Source,
        statistics: Option<&Statistics>,
        compute: DType,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<(), SearchError> {
        let done = AtomicU64::new(0);
        let (first, second): (Vec<&Wanted>, Vec<&Wanted>) =
            wanted.iter().partition(|wanted| matches!(wanted, Wanted::Factors { .. }));
        for stage in [first, second] {
            let found: Vec<Vec<f32>> = {
                let over = self.over(base);
                let find = |wanted: &&Wanted| {
                    let found = find(wanted, &over, statistics, compute);
                    progress(done.fetch_add(1, Ordering::Relaxed) + 1, over.vectors.shapes.len() as u64);
                    found
                };
                let mut found = Vec::with_capacity(stage.len());
                for beside in stage.chunks(BESIDE) {
                    found.extend(beside.par_iter().map(find).collect::<Result<Vec<_>, _>>()?);
                }
                found
            };
            for (wanted, values) in std::iter::zip(stage, found) {
                let bytes = quant::from_f32(DType::Float32, &values);
                self.values.insert(wanted.name(), DType::Float32, &wanted.shape(), bytes);
            }
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    #[error(transparent)]
    Weights(#[from] QuantError),
}

impl SearchError {
    pub fn hint(&self) -> Option<String> {
        match self {
            SearchError::Statistics(error) => error.hint(),
            SearchError::Weights(error) => error.hint(),
        }
    }
}

impl Source for Searched<'_> {
    fn entry(&self, name: &str) -> Option<Entry> {
        let own = self.vectors.shapes.get(name);
        own.map(|shape| Entry { dtype: DType::Float32, shape: shape.clone() }).or_else(|| self.base.entry(name))
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        match self.vectors.shapes.contains_key(name) {
            true => self.vectors.values.read(name, offset, buffer),
            false => self.base.read(name, offset, buffer),
        }
    }
}

fn find(
    wanted: &Wanted,
    source: &Searched<'_>,
    statistics: Option<&Statistics>,
    compute: DType,
) -> Result<Vec<f32>, SearchError> {
    let seen = |input: &str| -> Result<InputStatistics, SearchError> {
        let statistics = statistics.ok_or(StatisticsError::NoStatistics)?;
        Ok(statistics.of(input)?)
    };
    let values = |weight: &Weight| materialize_f32(weight, source, DType::Float32);
    let vector = |weight: &Option<Weight>| weight.as_ref().map(&values).transpose();
    Ok(match wanted {
        Wanted::Factors { input, method, channels, width, members, .. } => {
            let seen = seen(input)?;
            let weights = members.iter().map(|(weight, _)| values(weight)).collect::<Result<Vec<_>, _>>()?;
            match method {
                Method::Smooth { alpha, per_token } => {
                    let mut most = vec![0.0; *width];
                    weights.iter().for_each(|weights| quant::join_column_absmax(weights, &mut most));
                    let (of_inputs, of_weights) = (channels.most(&seen.absmax), channels.most(&most));
                    let matrices: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
                    let (rows, absmax) = (&seen.rows[..], &seen.absmax[..]);
                    let smoothed = Smoothed { matrices: &matrices, rows, absmax, per_token: *per_token };
                    let own = [&of_inputs[..], &of_weights];
                    let spread = |own: &[f32]| channels.spread(own, *width);
                    smoothed.search(*alpha, own, &spread, &|wide| channels.mean(wide), compute)
                }
                _ => {
                    let matrix = |(weights, (_, format)): (_, &(Weight, Format))| Matrix { weights, format: *format };
                    let matrices: Vec<Matrix> =
                        std::iter::zip(weights.iter().map(Vec::as_slice), members).map(matrix).collect();
                    let spread = |own: Vec<f32>| channels.spread(&own, *width);
                    awq::search(&matrices, &seen.rows, &channels.mean(&seen.mean), &spread, compute).factors
                }
            }
        }
        Wanted::Scales { of, format, input, .. } => {
            let width = of.shape().get(1).copied().unwrap_or(1);
            let rows = match input {
                Some((input, factors)) => {
                    let mut rows = seen(input)?.rows;
                    if let Some(factors) = vector(factors)? {
                        quant::scale_columns(&mut rows, &factors, |value, factor| value / factor);
                    }
                    rows
                }
                None => Vec::new(),
            };
            quant::clip(&values(of)?, width, &rows, *format, compute)
        }
        Wanted::Range { input, factors, .. } => {
            vec![quant::activation_scale(&seen(input)?.absmax, vector(factors)?.as_deref())]
        }
    })
}

//! What quantization does to each layer: how far its products are from those of the layer as it was, what it takes, and
//! why it is as it is.
mod heat;
mod page;
mod table;

pub use page::{Page, Scheme};
pub use table::{json, meaning, table};

use crate::calibration::SearchError;
use crate::compile::Compiled;
use graphs::interpret::round_tokens;
use graphs::{DType, Format, Network, Node, Op, Weight};
use quant::{Assignment, Deviation, Method, QuantError, Source, materialize_f32};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Rows of statistics that are multiplied; more hardly change the errors.
const ROWS: usize = 128;

/// Bytes of a matrix in float32 that one thread compares in one go. Fixed, so that sums are the same for any number of
/// threads; a thread holds a few times as much.
const BLOCK: usize = 8 << 20;

/// What an error is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The layer is as the checkpoint has it.
    Exact,
    /// Products of sampled inputs.
    Outputs { rows: usize },
    /// The weights alone: there are no statistics of what it reads.
    Weights,
}

/// Where the factors between a layer and what is before it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    None,
    /// Into the norm or layer before.
    Folded,
    /// Into an op of their own.
    Explicit,
}

/// One linear layer.
#[derive(Clone, Debug)]
pub struct Layer {
    pub network: String,
    pub path: String,
    pub outputs: usize,
    pub inputs: usize,
    /// The value that it reads, before factors and rounding.
    pub reads: Option<String>,
    pub format: Option<Format>,
    pub method: Method,
    /// What decided, for people.
    pub reason: String,
    /// What differs from the rule's word, and why.
    pub note: Option<String>,
    pub factors: Factors,
    pub basis: Basis,
    pub deviation: Deviation,
    /// Of the weights in the network's type, and as they are stored.
    pub bytes_before: u64,
    pub bytes_after: u64,
}

impl Layer {
    /// The format with the method that led to it, as a recipe says it: `int4-awq g64`.
    pub fn choice(&self) -> String {
        let Some(format) = self.format else { return "none".into() };
        let (word, group) = match format {
            Format::Int8 => ("int8", String::new()),
            Format::Int4 { group } if group == self.inputs => ("int4", " channel".into()),
            Format::Int4 { group } => ("int4", format!(" g{group}")),
        };
        match self.method.word() {
            "" => format!("{word}{group}"),
            method => format!("{word}-{method}{group}"),
        }
    }

    pub fn error(&self) -> f64 {
        self.deviation.relative()
    }
}

/// Layers whose error is above a bound, the worst first.
pub fn exceeding(layers: &[Layer], bound: f64) -> Vec<&Layer> {
    // What is not a number is not within the bound.
    let mut found: Vec<&Layer> =
        layers.iter().filter(|layer| layer.error().is_nan() || layer.error() > bound).collect();
    found.sort_by(|a, b| b.error().total_cmp(&a.error()));
    found
}

/// Layers within the bound whose factors are searched for together with those of layers that are not, so that they would
/// be other ones without these.
pub fn bound_to<'l>(layers: &'l [Layer], beyond: &[&Layer]) -> Vec<&'l Layer> {
    let scaled = |layer: &Layer| layer.method.scales_inputs() && layer.reads.is_some();
    let shares = |layer: &&Layer| beyond.iter().any(|other| scaled(other) && other.reads == layer.reads);
    let within = |layer: &&Layer| !beyond.iter().any(|other| std::ptr::eq(*other, *layer));
    layers.iter().filter(|layer| scaled(layer)).filter(shares).filter(within).collect()
}

/// A layer with what it takes to compare it.
struct Subject<'c> {
    weight: &'c Weight,
    original: &'c Weight,
    /// Roundings of its input, in order.
    roundings: Vec<(Option<&'c Weight>, bool)>,
    /// Name of the statistics of what it reads, where they are there.
    input: Option<String>,
}

/// Measures every linear layer of networks that are whole, after their vectors were found. Layers are read in blocks on
/// all threads; the result is the same for any number of them. `progress` is told the blocks done and their number.
///
/// # Errors
/// Weights or statistics that cannot be read.
pub fn measure(compiled: &Compiled, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Vec<Layer>, SearchError> {
    let (mut layers, mut subjects) = (Vec::new(), Vec::new());
    for passed in compiled.networks.iter().filter(|passed| passed.rank == 0) {
        let choices = passed.assignments.iter().map(|choice| (choice.path.as_str(), choice)).collect();
        for node in &passed.network.nodes {
            if let Some((layer, subject)) = subject(compiled, &passed.network, node, &choices)? {
                layers.push(layer);
                subjects.push(subject);
            }
        }
    }
    let mut jobs = Vec::new();
    for (number, layer) in layers.iter().enumerate().filter(|(_, layer)| layer.basis != Basis::Exact) {
        // An even number: two INT4 weights share a byte.
        let step = (BLOCK / 4 / layer.inputs.max(1)).max(2) / 2 * 2;
        jobs.extend((0..layer.outputs).step_by(step).map(|start| (number, start, (start + step).min(layer.outputs))));
    }
    let done = AtomicU64::new(0);
    let run = |(number, start, end): &(usize, usize, usize)| {
        let found = compare(compiled, &subjects[*number], *start, *end);
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, jobs.len() as u64);
        found
    };
    let parts: Vec<Deviation> = jobs.par_iter().map(run).collect::<Result<_, SearchError>>()?;
    for (number, layer) in layers.iter_mut().enumerate() {
        let own = std::iter::zip(&jobs, &parts).filter(|(job, _)| job.0 == number);
        layer.deviation = own.map(|(_, part)| *part).sum();
    }
    Ok(layers)
}

/// A linear layer and how to compare it; `None` for what no recipe is about.
fn subject<'c>(
    compiled: &'c Compiled,
    network: &'c Network,
    node: &'c Node,
    choices: &HashMap<&str, &Assignment>,
) -> Result<Option<(Layer, Subject<'c>)>, SearchError> {
    let (Op::Linear { weight, .. }, Some(choice)) = (&node.op, choices.get(node.path.as_str())) else {
        return Ok(None);
    };
    let &[outputs, inputs] = &weight.shape()[..] else { return Ok(None) };
    let original = original(weight);
    let bytes = |weight: &Weight| -> Result<u64, QuantError> {
        Ok(quant::layout(weight, compiled, compiled.dtype)?.iter().map(|part| part.bytes).sum())
    };
    // What is between the value that the statistics are of and the layer: factors, roundings.
    let (mut above, mut roundings, mut factors) = (node.inputs.first(), Vec::new(), Factors::None);
    let reads = loop {
        let Some(before) = above.and_then(|id| network.node(*id)) else { break None };
        match &before.op {
            Op::QuantizeInput { scale, wide } => roundings.insert(0, (scale.as_ref(), *wide)),
            Op::ScaleBy { .. } => factors = Factors::Explicit,
            _ => break Some(format!("{}/{}", network.name, before.path)),
        }
        above = before.inputs.first();
    };
    if factors == Factors::None && scalings(weight).iter().any(|scaling| scaling.axis == 1) {
        factors = Factors::Folded;
    }
    let tensor = original.tensors().into_iter().find_map(|(name, _)| compiled.source.quantized_by(name));
    let statistics = compiled.statistics();
    let input = reads.clone().filter(|input| statistics.is_some_and(|statistics| statistics.has(input)));
    let basis = match (&choice.format, tensor, &input, statistics) {
        (None, ..) | (_, Some(_), ..) => Basis::Exact,
        (.., Some(input), Some(statistics)) => {
            let seen = statistics.header.counts.get(input).map_or(0, |count| *count as usize);
            match seen.min(statistics.header.rows).min(ROWS) {
                0 => Basis::Weights,
                rows => Basis::Outputs { rows },
            }
        }
        _ => Basis::Weights,
    };
    let reason = match tensor {
        Some(tool) => format!("as the checkpoint has it ({tool})"),
        None => compiled.recipe(&network.name).reason(choice.rule),
    };
    let layer = Layer {
        network: network.name.clone(),
        path: node.path.clone(),
        outputs,
        inputs,
        reads,
        format: choice.format,
        method: choice.method,
        reason,
        note: choice.note.clone(),
        factors,
        basis,
        deviation: Deviation::default(),
        bytes_before: if tensor.is_some() { compiled.dtype.bytes(outputs * inputs) as u64 } else { bytes(original)? },
        bytes_after: bytes(weight)?,
    };
    let input = input.filter(|_| basis != Basis::Weights);
    Ok(Some((layer, Subject { weight, original, roundings, input })))
}

/// A vector that a weight was multiplied by along an axis, or divided.
struct Scaling<'w> {
    axis: usize,
    by: &'w Weight,
    divide: bool,
}

fn scalings(weight: &Weight) -> Vec<Scaling<'_>> {
    match weight {
        Weight::Packed { of, .. } => scalings(of),
        Weight::Scaled { axis, by, divide, of } => {
            let mut inner = scalings(of);
            inner.push(Scaling { axis: *axis, by, divide: *divide });
            inner
        }
        _ => Vec::new(),
    }
}

/// A weight before anything was done to it.
fn original(weight: &Weight) -> &Weight {
    match weight {
        Weight::Packed { of, .. } | Weight::Scaled { of, .. } => original(of),
        other => other,
    }
}

/// Some outputs of a layer against what they were.
fn compare(compiled: &Compiled, subject: &Subject<'_>, start: usize, end: usize) -> Result<Deviation, SearchError> {
    let source: &dyn Source = compiled;
    let part = |of: &Weight| Weight::Slice { axis: 0, start, end, of: Box::new(of.clone()) };
    let vector = |weight: &Weight| materialize_f32(weight, source, DType::Float32);
    let wanted = materialize_f32(&part(subject.original), source, DType::Float32)?;
    let mut found = materialize_f32(&part(subject.weight), source, compiled.dtype)?;
    let width = wanted.len() / (end - start).max(1);
    let rows = match (&subject.input, compiled.statistics()) {
        (Some(input), Some(statistics)) => {
            let mut rows = statistics.of(input)?.rows;
            rows.truncate(ROWS * width);
            rows
        }
        _ => Vec::new(),
    };
    let mut read = rows.clone();
    for Scaling { axis, by, divide } in scalings(subject.weight) {
        let by = vector(by)?;
        let undo = |value: &mut f32, factor: f32| if divide { *value *= factor } else { *value /= factor };
        if axis == 0 {
            // The layer behind takes it back.
            let rows = found.chunks_exact_mut(width.max(1));
            std::iter::zip(rows, &by[start..]).for_each(|(row, factor)| row.iter_mut().for_each(|v| undo(v, *factor)));
        } else {
            // What the layer before divides its outputs by, or without inputs to be divided the weights themselves.
            let of = if rows.is_empty() { &mut found } else { &mut read };
            let rows = of.chunks_exact_mut(width.max(1));
            rows.for_each(|row| std::iter::zip(row, &by).for_each(|(value, factor)| undo(value, *factor)));
        }
    }
    if rows.is_empty() {
        return Ok(Deviation::of_weights(&wanted, &found));
    }
    for (scale, wide) in &subject.roundings {
        let scale = scale.map(vector).transpose()?.and_then(|scale| scale.first().copied());
        round_tokens(&mut read, width, scale, None, *wide);
    }
    Ok(Deviation::of_products((&rows, &wanted), (&read, &found), width))
}

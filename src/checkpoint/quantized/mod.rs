//! Checkpoints that another tool has quantized: for each such layer `X` tensors that no file holds, made of those that it
//! holds as they are read. `X.weight` `[out, in]` is the matrix in float32; `X.weight.scale` its scales in the shape that
//! [`Format::scale_shape`] has. A quotient of the two is the file's own integer again.
//!
//! Asymmetric layers have two more. (q - z) s = (q - 8) s + (8 - z) s, so `X.weight.symmetric` is (q - 8) s for INT4 as
//! TensorRT has it, and `X.weight.correction` `[out, groups]` is (8 - z) s, to be multiplied by sums of the inputs by
//! groups: `X.weight.group_sums` `[groups, in]` holds ones where an input is in a group.
mod fault;
mod integers;
mod layer;
mod read;
mod scheme;

pub use fault::QuantizedFault;
pub(super) use scheme::{Scheme as QuantizationScheme, rank_scheme, read_scheme};

use super::weights::Weights;
use super::{CheckpointError, TensorEntry};
use graphs::{DType, Format};
use layer::Layer;
use read::{Prepared, check_order, check_sizes, matrix, prepare};
use scheme::{Method, Scheme};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of layers that are kept between reads: rows of some layouts lie scattered over the whole tensor.
const KEPT: usize = 256 << 20;

/// How the inputs of a layer are rounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputScale {
    None,
    /// Each token by its own scale, its largest magnitude / 127.5 (compressed-tensors
    /// `quantization/utils/helpers.py`: the range of INT8 is 255).
    Token,
    /// By `X.input_scale`, which has this shape.
    Static {
        shape: Vec<usize>,
    },
}

/// What the network must know of a quantized layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizedLinear {
    pub format: Format,
    pub asymmetric: bool,
    pub groups: usize,
    /// `X.pre_quant_scale` `[in]` multiplies the inputs first.
    pub prescale: bool,
    /// `X.bias` `[out]` is there, be it in the model or not: GPTQ's tools have written biases of zeros.
    pub bias: bool,
    pub inputs: InputScale,
}

/// What tensors beside `X.weight` a quantized layer has: what replaces `.weight` in its name.
const EXTRAS: [&str; 6] = [
    ".weight.scale",
    ".weight.symmetric",
    ".weight.correction",
    ".weight.group_sums",
    ".pre_quant_scale",
    ".input_scale",
];

#[derive(Clone, Copy, Debug)]
enum Part {
    Weight,
    Scale,
    Symmetric,
    Correction,
    GroupSums,
}

/// The quantized layers of a checkpoint.
#[derive(Debug)]
pub(super) struct Quantized {
    method: Method,
    /// By path.
    layers: BTreeMap<String, Layer>,
    /// What a model finds: plain tensors, and a `weight` for each quantized layer.
    presented: BTreeMap<String, TensorEntry>,
    /// What passes add to that.
    extras: BTreeMap<String, TensorEntry>,
    /// Which layer's part a name is that no file holds.
    made: BTreeMap<String, (String, Part)>,
    kept: Mutex<VecDeque<(String, Arc<Prepared>)>>,
}

impl Quantized {
    /// Finds the layers by the headers; small tensors that decide whether a layer can be kept are read. `schemes` are by the
    /// prefix of the names that they are about.
    pub(super) fn new(weights: &Weights, schemes: &[(String, Scheme)]) -> Result<Option<Quantized>, CheckpointError> {
        let mut layers: BTreeMap<String, Layer> = BTreeMap::new();
        let Some((_, Scheme { method, .. })) = schemes.first() else { return Ok(None) };
        for (name, entry) in weights.tensors() {
            let Some((_, scheme)) = schemes.iter().find(|(prefix, _)| name.starts_with(prefix)) else { continue };
            if let Some((path, layer)) = layer::layer(scheme, name, entry, weights)? {
                check_order(weights, &layer)?;
                check_sizes(weights, &layer)?;
                layers.insert(path, layer);
            }
        }
        let mut quantized = Quantized {
            method: *method,
            layers: BTreeMap::new(),
            presented: weights.tensors().map(|(name, entry)| (name.to_owned(), entry.clone())).collect(),
            extras: BTreeMap::new(),
            made: BTreeMap::new(),
            kept: Mutex::default(),
        };
        for (path, layer) in layers {
            for name in &layer.taken {
                if let Some(entry) = quantized.presented.remove(name) {
                    quantized.extras.insert(name.clone(), entry);
                }
            }
            quantized.present(&path, &layer);
            quantized.layers.insert(path, layer);
        }
        Ok(Some(quantized))
    }

    fn present(&mut self, path: &str, layer: &Layer) {
        let Layer { out, input, groups, .. } = *layer;
        let mut parts = vec![
            (".weight", Part::Weight, vec![out, input]),
            (".weight.scale", Part::Scale, layer.linear.format.scale_shape(out, input)),
        ];
        if layer.linear.asymmetric {
            parts.push((".weight.symmetric", Part::Symmetric, vec![out, input]));
            parts.push((".weight.correction", Part::Correction, vec![out, groups]));
            parts.push((".weight.group_sums", Part::GroupSums, vec![groups, input]));
        }
        for (suffix, part, shape) in parts {
            let name = format!("{path}{suffix}");
            let bytes = 4 * shape.iter().product::<usize>() as u64;
            // Of no file: nothing can be mapped.
            let entry = TensorEntry { file: usize::MAX, dtype: DType::Float32, shape, offset: 0, bytes };
            let list = if suffix == ".weight" { &mut self.presented } else { &mut self.extras };
            list.insert(name.clone(), entry);
            self.made.insert(name, (path.to_owned(), part));
        }
    }

    /// The tool that quantized, in words for reports.
    pub(super) fn tool(&self) -> &'static str {
        match self.method {
            Method::AutoAwq => "awq",
            Method::Gptq => "gptq",
            Method::CompressedTensors => "compressed-tensors",
            Method::Modelopt => "modelopt",
        }
    }

    pub(super) fn presented(&self) -> &BTreeMap<String, TensorEntry> {
        &self.presented
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        // A layer's own integers may have the name of what they are presented as.
        self.presented.get(name).or_else(|| self.extras.get(name))
    }

    /// The layer of a presented `X.weight`.
    pub(super) fn linear(&self, weight: &str) -> Option<&QuantizedLinear> {
        self.layers.get(weight.strip_suffix(".weight")?).map(|layer| &layer.linear)
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &QuantizedLinear> {
        self.layers.values().map(|layer| &layer.linear)
    }

    /// What replaces `.weight` in the names of the other tensors of a layer.
    pub(super) fn extras(&self, weight: &str) -> Vec<&'static str> {
        let Some(path) = weight.strip_suffix(".weight").filter(|path| self.layers.contains_key(*path)) else {
            return Vec::new();
        };
        EXTRAS.into_iter().filter(|extra| self.extras.contains_key(&format!("{path}{extra}"))).collect()
    }

    /// Fills `buffer` where no file holds the tensor; else gives `false`.
    pub(super) fn read_into(
        &self,
        weights: &Weights,
        name: &str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<bool, CheckpointError> {
        let Some((layer, part)) = self.made.get(name).and_then(|(path, part)| Some((self.layers.get(path)?, *part)))
        else {
            return Ok(false);
        };
        let width = match part {
            Part::Weight | Part::Symmetric | Part::GroupSums => layer.input,
            Part::Correction => layer.groups,
            Part::Scale => 1,
        };
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let (first, last) = (begin / 4 / width, begin.saturating_add(buffer.len()).div_ceil(4).div_ceil(width));
        let rows = self.tensor(name).map_or(0, |entry| entry.bytes as usize / 4 / width);
        if last > rows {
            let (file, end) = (weights.folder().to_owned(), u128::from(offset) + buffer.len() as u128);
            let found = 4 * (rows * width) as u64;
            return Err(CheckpointError::Range { file, tensor: name.into(), begin: offset, end, found });
        }
        let values = match part {
            Part::GroupSums => {
                let group = layer.input / layer.groups;
                let is_in = |row: usize, at: usize| if at / group == row { 1.0 } else { 0.0 };
                (first..last).flat_map(|row| (0..layer.input).map(move |at| is_in(row, at))).collect()
            }
            _ => {
                let prepared = self.prepared(weights, layer)?;
                match part {
                    Part::Scale => prepared.scales[first..last].to_vec(),
                    Part::Correction => {
                        let one = |output: usize, group: usize| {
                            let at = group * layer.out + output;
                            -prepared.zeros[at] as f32 * prepared.scales[at]
                        };
                        (first..last)
                            .flat_map(|output| (0..layer.groups).map(move |group| one(output, group)))
                            .collect()
                    }
                    _ => matrix(weights, layer, &prepared, first..last, matches!(part, Part::Weight))?,
                }
            }
        };
        let skip = begin - 4 * first * width;
        let (whole, rest) = buffer.as_chunks_mut::<4>();
        if skip.is_multiple_of(4) && rest.is_empty() {
            std::iter::zip(whole, &values[skip / 4..]).for_each(|(into, value)| *into = value.to_le_bytes());
        } else {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            buffer.copy_from_slice(&bytes[skip..skip + buffer.len()]);
        }
        Ok(true)
    }

    fn prepared(&self, weights: &Weights, layer: &Layer) -> Result<Arc<Prepared>, CheckpointError> {
        let held = |kept: &VecDeque<(String, Arc<Prepared>)>| {
            kept.iter().find(|(name, _)| *name == layer.integers).map(|(_, prepared)| prepared.clone())
        };
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prepared) = held(&lock()) {
            return Ok(prepared);
        }
        let prepared = Arc::new(prepare(weights, layer)?);
        let mut kept = lock();
        if let Some(prepared) = held(&kept) {
            return Ok(prepared);
        }
        kept.push_back((layer.integers.clone(), prepared.clone()));
        while kept.len() > 1 && kept.iter().map(|(_, prepared)| prepared.bytes()).sum::<usize>() > KEPT {
            kept.pop_front();
        }
        Ok(prepared)
    }
}

//! A weight is an expression over checkpoint tensors, not bytes: only `quant::materialize` turns one into bytes.
use crate::DType;
use serde::{Deserialize, Serialize};

/// How a quantized weight matrix is stored. All are symmetric; the logical shape stays the checkpoint's `[out, in]`,
/// the stored matrix is `[in, out]` (TensorRT takes it in place, `[out, in]` it would transpose on the CPU first).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// INT8, one scale per output channel: `scale[out]`.
    Int8,
    /// INT4 in groups of `group` consecutive inputs: `scale[in / group, out]`. `group` equal to `in` means per output channel.
    Int4 { group: usize },
}

impl Format {
    pub fn dtype(self) -> DType {
        match self {
            Format::Int8 => DType::Int8,
            Format::Int4 { .. } => DType::Int4,
        }
    }

    /// The largest quantized magnitude: scale = absmax / `limit`.
    pub fn limit(self) -> f32 {
        match self {
            Format::Int8 => 127.0,
            Format::Int4 { .. } => 7.0,
        }
    }

    /// Shape of the scales of a matrix of logical shape `[out, in]`.
    pub fn scale_shape(self, out: usize, input: usize) -> Vec<usize> {
        match self {
            Format::Int8 => vec![out],
            Format::Int4 { group } => vec![input / group, out],
        }
    }
}

/// The size of the groups in inputs `start..end` of a matrix in groups of `group`: whole groups, or a part of one; `None` where
/// groups are cut otherwise.
pub fn group_of_part(start: usize, end: usize, group: usize) -> Option<usize> {
    let group = group.max(1);
    if start.is_multiple_of(group) && end.is_multiple_of(group) {
        return Some(group);
    }
    let last = end.checked_sub(1).filter(|last| *last >= start)?;
    (start / group == last / group).then_some(end - start)
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Format::Int8 => f.write_str("int8"),
            Format::Int4 { group } => write!(f, "int4_g{group}"),
        }
    }
}

/// A weight as an expression.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weight {
    /// A checkpoint tensor by its canonical name (Hugging Face's), with the shape that the network needs.
    Tensor { name: String, shape: Vec<usize> },
    /// A quantized matrix, quantized as a whole before any slicing above it.
    Packed {
        format: Format,
        /// Scales of shape [`Format::scale_shape`] in place of those that the largest magnitudes give.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scales: Option<Box<Weight>>,
        of: Box<Weight>,
    },
    /// Multiplied along one axis by a vector, or divided by it: what smoothing moves between a layer and the one before.
    Scaled {
        axis: usize,
        by: Box<Weight>,
        #[serde(default)]
        divide: bool,
        of: Box<Weight>,
    },
    /// `start..end` of one axis of the logical shape.
    Slice { axis: usize, start: usize, end: usize, of: Box<Weight> },
    /// Several weights one after the other along one axis.
    Concat { axis: usize, parts: Vec<Weight> },
}

impl Weight {
    pub fn tensor(name: impl Into<String>, shape: &[usize]) -> Weight {
        Weight::Tensor { name: name.into(), shape: shape.to_vec() }
    }

    /// The logical shape; for matrices `[out, in]`.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Weight::Tensor { shape, .. } => shape.clone(),
            Weight::Packed { of, .. } | Weight::Scaled { of, .. } => of.shape(),
            Weight::Slice { axis, start, end, of } => {
                let mut shape = of.shape();
                if let Some(size) = shape.get_mut(*axis) {
                    *size = end.saturating_sub(*start);
                }
                shape
            }
            Weight::Concat { axis, parts } => {
                let mut shape = parts.first().map(Weight::shape).unwrap_or_default();
                if let Some(size) = shape.get_mut(*axis) {
                    *size = parts.iter().filter_map(|part| part.shape().get(*axis).copied()).sum();
                }
                shape
            }
        }
    }

    pub fn count(&self) -> usize {
        self.shape().iter().product()
    }

    /// Quantized with scales of its own.
    pub fn packed(self, format: Format) -> Weight {
        Weight::Packed { format, scales: None, of: Box::new(self) }
    }

    /// The format of a quantized weight, found below slices, which may leave a part of a group; `None` for a plain one.
    pub fn format(&self) -> Option<Format> {
        match self {
            Weight::Tensor { .. } => None,
            Weight::Packed { format, .. } => Some(*format),
            Weight::Scaled { of, .. } => of.format(),
            Weight::Slice { axis, start, end, of } => match (of.format()?, axis) {
                (Format::Int4 { group }, 1) => {
                    Some(Format::Int4 { group: group_of_part(*start, *end, group).unwrap_or(group) })
                }
                (format, _) => Some(format),
            },
            Weight::Concat { parts, .. } => parts.first().and_then(Weight::format),
        }
    }

    /// Every checkpoint tensor that the expression reads: name and shape.
    pub fn tensors(&self) -> Vec<(&str, &[usize])> {
        match self {
            Weight::Tensor { name, shape } => vec![(name, shape)],
            Weight::Slice { of, .. } => of.tensors(),
            Weight::Packed { of, scales, .. } => {
                of.tensors().into_iter().chain(scales.iter().flat_map(|scales| scales.tensors())).collect()
            }
            Weight::Scaled { of, by, .. } => [of.tensors(), by.tensors()].concat(),
            Weight::Concat { parts, .. } => parts.iter().flat_map(Weight::tensors).collect(),
        }
    }

    /// A name that is the same for equal expressions and differs otherwise; a plain tensor's is the tensor's own.
    /// It is the key in weight files, where a quantized weight adds `KEY.scale`.
    pub fn key(&self) -> String {
        match self {
            Weight::Tensor { name, .. } => name.clone(),
            Weight::Packed { format, scales: None, of } => format!("{}.{format}", of.key()),
            Weight::Packed { format, scales: Some(scales), of } => format!("{}.{format}({})", of.key(), scales.key()),
            Weight::Scaled { axis, by, divide, of } => {
                format!("{}{}{axis}({})", of.key(), if *divide { "/" } else { "*" }, by.key())
            }
            Weight::Slice { axis, start, end, of } => format!("{}[{axis}:{start}..{end}]", of.key()),
            Weight::Concat { axis, parts } => {
                format!("concat{axis}({})", parts.iter().map(Weight::key).collect::<Vec<_>>().join(","))
            }
        }
    }
}

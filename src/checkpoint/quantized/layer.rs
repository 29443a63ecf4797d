//! One layer as another tool has quantized it: which tensors it has, checked against each other by their headers.
use super::integers::{Packing, ZeroPacking};
use super::scheme::{Group, Inputs, Kind, Method, Scheme};
use super::{InputScale, QuantizedFault, QuantizedLinear};
use crate::checkpoint::{TensorEntry, Weights};
use graphs::{DType, Format};

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleOrder {
    /// `[groups, out]`.
    Groups,
    /// `[out, groups]`, or `[out]`.
    Outputs,
    /// One for all.
    One,
}

#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) integers: String,
    pub(super) packing: Packing,
    pub(super) bits: usize,
    pub(super) out: usize,
    pub(super) input: usize,
    pub(super) groups: usize,
    pub(super) scales: String,
    pub(super) scale_order: ScaleOrder,
    pub(super) scale_type: DType,
    /// Of asymmetric layers, and of symmetric ones that have them all the same.
    pub(super) zeros: Option<(String, ZeroPacking)>,
    /// I32 `[in]`: the group of each input.
    pub(super) order: Option<String>,
    /// Holds the logical shape once more.
    pub(super) sizes: Option<String>,
    pub(super) linear: QuantizedLinear,
    /// Tensors that are this layer's and no one else's.
    pub(super) taken: Vec<String>,
}

/// The layer whose integers the tensor `name` may be; `None` where it is a plain tensor.
pub(super) fn layer(
    scheme: &Scheme,
    name: &str,
    entry: &TensorEntry,
    weights: &Weights,
) -> Result<Option<(String, Layer)>, QuantizedFault> {
    let stem = |suffix: &str| name.strip_suffix(suffix).map(str::to_owned);
    let bytes = |dtype| if entry.dtype == dtype { stem(".weight") } else { None };
    let found = match scheme.method {
        Method::AutoAwq => stem(".qweight").map(|path| (path, Packing::AwqOutputs)),
        Method::Gptq => stem(".qweight").map(|path| (path, Packing::Inputs)),
        Method::CompressedTensors => stem(".weight_packed")
            .map(|path| (path, Packing::Rows))
            .or_else(|| bytes(DType::Int8).map(|path| (path, Packing::Bytes))),
        Method::Modelopt => bytes(DType::Uint8)
            .map(|path| (path, Packing::PairsOfOutputs))
            .or_else(|| bytes(DType::Int8).map(|path| (path, Packing::Bytes))),
    };
    let Some((path, packing)) = found else { return Ok(None) };
    let reader = Reader { scheme, path: &path, name, entry, packing, weights };
    reader.read().map(|layer| Some((path.clone(), layer)))
}

struct Reader<'r> {
    scheme: &'r Scheme,
    path: &'r str,
    name: &'r str,
    entry: &'r TensorEntry,
    packing: Packing,
    weights: &'r Weights,
}

impl Reader<'_> {
    fn own(&self, part: &str) -> String {
        format!("{}.{part}", self.path)
    }

    fn optional(&self, part: &str) -> Option<(String, &TensorEntry)> {
        let name = self.own(part);
        self.weights.tensor(&name).map(|entry| (name, entry))
    }

    fn needed(&self, part: &str) -> Result<(String, &TensorEntry), QuantizedFault> {
        let missing = || QuantizedFault::Missing { missing: self.own(part), present: self.name.to_owned() };
        self.optional(part).ok_or_else(missing)
    }

    fn read(&self) -> Result<Layer, QuantizedFault> {
        let bits = self.bits()?;
        let old = matches!(self.scheme.method, Method::AutoAwq | Method::Gptq);
        let (scales, scale) = self.needed(if old { "scales" } else { "weight_scale" })?;
        if !scale.dtype.is_float() {
            return Err(wrong(&scales, scale, "floats".into()));
        }
        let order = self.optional(if old { "g_idx" } else { "weight_g_idx" });
        let sizes = (self.packing == Packing::Rows).then(|| self.needed("weight_shape")).transpose()?;
        let (out, input) = self.shape(bits, scale)?;
        if let Some((name, entry)) = &order
            && (entry.dtype != DType::Int32 || entry.shape != [input])
        {
            return Err(wrong(name, entry, format!("int32[{input}]")));
        }
        if let Some((name, entry)) = &sizes
            && (![DType::Int32, DType::Int64].contains(&entry.dtype) || entry.shape != [2])
        {
            return Err(wrong(name, entry, "two whole numbers".into()));
        }
        let (groups, scale_order) = match (old, &scale.shape[..]) {
            (true, &[groups, outputs]) if outputs == out => (groups, ScaleOrder::Groups),
            (false, &[outputs, groups]) if outputs == out => (groups, ScaleOrder::Outputs),
            (false, &[outputs]) if outputs == out => (1, ScaleOrder::Outputs),
            (false, [] | [1] | [1, 1]) => (1, ScaleOrder::One),
            (old, _) => {
                let wanted = if old { format!("[groups, {out}]") } else { format!("[{out}, groups]") };
                return Err(wrong(&scales, scale, wanted));
            }
        };
        if groups == 0 || !input.is_multiple_of(groups) {
            return Err(wrong(&scales, scale, format!("a number of groups that divides {input} inputs")));
        }
        let group = input / groups;
        let kind = self.kind(bits, &scales, group)?;
        let format = match bits {
            4 => Format::Int4 { group },
            _ if groups == 1 => Format::Int8,
            _ => return Err(QuantizedFault::Int8Groups { tensor: self.name.into(), bits, group }),
        };
        let zeros = self.zeros(kind, bits, out, groups)?;
        let prescale = match self.optional("pre_quant_scale").filter(|_| self.scheme.method == Method::Modelopt) {
            None => None,
            Some((_, entry)) if entry.dtype.is_float() && entry.shape == [input] => Some(self.own("pre_quant_scale")),
            Some((name, entry)) => return Err(wrong(&name, entry, format!("floats [{input}]"))),
        };
        let (input_scale, static_scale) = match kind.inputs {
            Inputs::Plain => (InputScale::None, None),
            Inputs::Token => (InputScale::Token, None),
            Inputs::Static => {
                let (name, entry) = self.needed("input_scale")?;
                if !entry.dtype.is_float() || entry.shape.iter().product::<usize>() != 1 {
                    return Err(wrong(&name, entry, "one float".into()));
                }
                (InputScale::Static { shape: entry.shape.clone() }, Some(name))
            }
        };
        let bias = match self.optional("bias") {
            None => false,
            Some((_, entry)) if entry.dtype.is_float() && entry.shape == [out] => true,
            Some((name, entry)) => return Err(wrong(&name, entry, format!("floats [{out}]"))),
        };
        let linear = QuantizedLinear {
            format,
            asymmetric: !kind.symmetric,
            groups,
            prescale: prescale.is_some(),
            bias,
            inputs: input_scale,
        };
        let (order, sizes) = (order.map(|(name, _)| name), sizes.map(|(name, _)| name));
        let zeros_name = zeros.as_ref().map(|(name, _)| name.clone());
        let others = [zeros_name, order.clone(), sizes.clone(), prescale, static_scale].into_iter().flatten();
        let taken = [self.name.to_owned(), scales.clone()].into_iter().chain(others).collect();
        Ok(Layer {
            integers: self.name.into(),
            packing: self.packing,
            bits,
            out,
            input,
            groups,
            scales,
            scale_order,
            scale_type: scale.dtype,
            zeros,
            order,
            sizes,
            linear,
            taken,
        })
    }

    /// By the config where it tells one number, else by the shapes.
    fn bits(&self) -> Result<usize, QuantizedFault> {
        let kinds = &self.scheme.kinds;
        let mut described: Vec<usize> = kinds.iter().map(|kind| kind.bits).collect();
        described.sort_unstable();
        described.dedup();
        let bits = match (self.packing, &described[..]) {
            (Packing::Bytes, _) => 8,
            (Packing::PairsOfOutputs, _) => 4,
            (_, [bits]) => *bits,
            // Packed with 4 and with 8 bits: as wide as the sizes say that it is.
            (_, _) => {
                let words = self.entry.shape.get(1).copied().unwrap_or(0);
                let scale =
                    self.optional("weight_scale").map_or(1, |(_, entry)| entry.shape.get(1).copied().unwrap_or(1));
                if kinds.iter().any(|kind| kind.bits == 4 && kind.group == Group::Of((words * 8 / scale.max(1)).max(1)))
                {
                    4
                } else {
                    8
                }
            }
        };
        match described.contains(&bits) {
            true => Ok(bits),
            false => Err(QuantizedFault::Undescribed { tensor: self.name.into(), found: bits }),
        }
    }

    /// Outputs and inputs.
    fn shape(&self, bits: usize, scale: &TensorEntry) -> Result<(usize, usize), QuantizedFault> {
        let (dtype, wanted) = match self.packing {
            Packing::Bytes => (DType::Int8, "int8[out, in]"),
            Packing::PairsOfOutputs => (DType::Uint8, "uint8[out / 2, in]"),
            Packing::AwqOutputs => (DType::Int32, "int32[in, out / 8]"),
            Packing::Inputs => (DType::Int32, "int32[in * bits / 32, out]"),
            Packing::Rows => (DType::Int32, "int32[out, in * bits / 32]"),
        };
        let (rows, columns) = match self.entry.shape[..] {
            [rows, columns] if self.entry.dtype == dtype && rows * columns > 0 => (rows, columns),
            _ => return Err(wrong(self.name, self.entry, wanted.into())),
        };
        Ok(match self.packing {
            Packing::Bytes => (rows, columns),
            Packing::PairsOfOutputs => (2 * rows, columns),
            Packing::AwqOutputs => (8 * columns, rows),
            Packing::Inputs => (columns, rows * 32 / bits),
            // Padded to whole words: the scales tell how many inputs there are where groups do not fill them.
            Packing::Rows => (rows, self.padded(columns * 32 / bits, scale)),
        })
    }

    /// Inputs of a row of `most`, of which a last word may be padding.
    fn padded(&self, most: usize, scale: &TensorEntry) -> usize {
        let groups = scale.shape.get(1).copied().unwrap_or(1);
        let sizes = self.scheme.kinds.iter().filter_map(|kind| match kind.group {
            Group::Of(size) => Some(size * groups),
            _ => None,
        });
        sizes.into_iter().find(|input| *input <= most && most - input < 8).unwrap_or(most)
    }

    fn kind(&self, bits: usize, scales: &str, group: usize) -> Result<Kind, QuantizedFault> {
        let fits = |kind: &&Kind| kind.bits == bits;
        let mut kinds: Vec<Kind> = self.scheme.kinds.iter().filter(fits).copied().collect();
        let has_zeros = self.optional("weight_zero_point").is_some();
        if kinds.len() > 1 {
            // Of several the one that the layer's own tensors show.
            let is_group = |kind: &Kind| match kind.group {
                Group::Told => true,
                Group::Whole => self.groups_are_whole(),
                Group::Of(size) => size == group,
            };
            kinds.retain(|kind| is_group(kind) && kind.symmetric != has_zeros);
            kinds.dedup();
        }
        let [kind] = kinds[..] else {
            let tensor = self.name.to_owned();
            return Err(match kinds.len() {
                0 => QuantizedFault::Undescribed { tensor, found: bits },
                found => QuantizedFault::Ambiguous { tensor, found },
            });
        };
        match kind.group {
            Group::Of(size) if size != group => {
                Err(QuantizedFault::Group { tensor: scales.into(), found: group, wanted: size })
            }
            Group::Whole if !self.groups_are_whole() => {
                let input = self.shape(bits, self.needed(self.scale_part())?.1)?.1;
                Err(QuantizedFault::Group { tensor: scales.into(), found: group, wanted: input })
            }
            _ => Ok(kind),
        }
    }

    fn scale_part(&self) -> &'static str {
        if matches!(self.scheme.method, Method::AutoAwq | Method::Gptq) { "scales" } else { "weight_scale" }
    }

    fn groups_are_whole(&self) -> bool {
        let Some((_, entry)) = self.optional(self.scale_part()) else { return false };
        let axis = if self.scale_part() == "scales" { 0 } else { 1 };
        entry.shape.get(axis).is_none_or(|groups| *groups == 1)
    }

    fn zeros(
        &self,
        kind: Kind,
        bits: usize,
        out: usize,
        groups: usize,
    ) -> Result<Option<(String, ZeroPacking)>, QuantizedFault> {
        let part = match self.scheme.method {
            Method::AutoAwq | Method::Gptq => "qzeros",
            Method::CompressedTensors => "weight_zero_point",
            Method::Modelopt => return Ok(None),
        };
        // Symmetric layers may come without.
        let (name, entry) = match self.optional(part) {
            None if kind.symmetric => return Ok(None),
            _ => self.needed(part)?,
        };
        let words = (out * bits).div_ceil(32);
        let (packing, dtype, shape) = match (self.scheme.method, entry.dtype) {
            (Method::AutoAwq, _) => (ZeroPacking::Awq, DType::Int32, [groups, words]),
            (Method::Gptq, _) if self.scheme.less_one => (ZeroPacking::OutputsLessOne, DType::Int32, [groups, words]),
            (Method::Gptq, _) => (ZeroPacking::Outputs, DType::Int32, [groups, words]),
            (_, DType::Int8) => (ZeroPacking::Bytes, DType::Int8, [out, groups]),
            _ => (ZeroPacking::Columns, DType::Int32, [words, groups]),
        };
        match entry.dtype == dtype && entry.shape == shape {
            true => Ok(Some((name, packing))),
            false => Err(wrong(&name, entry, format!("{dtype}{shape:?}"))),
        }
    }
}

fn wrong(name: &str, entry: &TensorEntry, wanted: String) -> QuantizedFault {
    QuantizedFault::Tensor { tensor: name.into(), found: entry.dtype, shape: entry.shape.clone(), wanted }
}

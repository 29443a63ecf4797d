//! The numbers of a quantized layer, read by position.
use super::layer::{Layer, ScaleOrder};
use super::{QuantizedFault, integers};
use crate::checkpoint::{CheckpointError, Weights};
use std::ops::Range;

/// A layer's scales, zero points, and integers where their rows lie scattered.
#[derive(Debug)]
pub(super) struct Prepared {
    /// `[groups, out]`.
    pub(super) scales: Vec<f32>,
    /// Less half their range, `[groups, out]`; of asymmetric layers.
    pub(super) zeros: Vec<i32>,
    integers: Vec<u8>,
}

impl Prepared {
    pub(super) fn bytes(&self) -> usize {
        4 * (self.scales.len() + self.zeros.len()) + self.integers.len()
    }
}

fn whole(weights: &Weights, name: &str) -> Result<Vec<u8>, CheckpointError> {
    let mut bytes = vec![0; weights.tensor(name).map_or(0, |entry| entry.bytes as usize)];
    weights.read_into(name, 0, &mut bytes)?;
    Ok(bytes)
}

pub(super) fn prepare(weights: &Weights, layer: &Layer) -> Result<Prepared, CheckpointError> {
    let Layer { out, groups, bits, .. } = *layer;
    let stored = quant::to_f32(layer.scale_type, &whole(weights, &layer.scales)?);
    let place = |group: usize, output: usize| match layer.scale_order {
        ScaleOrder::Groups => group * out + output,
        ScaleOrder::Outputs => output * groups + group,
        ScaleOrder::One => 0,
    };
    let places = (0..groups).flat_map(|group| (0..out).map(move |output| (group, output)));
    let scales: Vec<f32> = places.clone().map(|(group, output)| stored[place(group, output)]).collect();
    // A group of zeros may have the scale 0.
    let bad = |(_, scale): &(_, &f32)| !scale.is_finite() || **scale < 0.0;
    if let Some(((group, output), found)) = places.clone().zip(&scales).find(bad) {
        return Err(QuantizedFault::Scale { tensor: layer.scales.clone(), output, group, found: *found }.into());
    }
    let mut zeros = Vec::new();
    if let Some((name, packing)) = &layer.zeros {
        zeros = integers::zeros(*packing, bits, [groups, out], &whole(weights, name)?);
        let most = if layer.linear.asymmetric { (1 << (bits - 1)) - 1 } else { 0 };
        let least = if layer.linear.asymmetric { -most - 1 } else { 0 };
        if let Some(((group, output), found)) = places.zip(&zeros).find(|(_, zero)| !(least..=most).contains(*zero)) {
            let middle = 1 << (bits - 1);
            let wanted = match layer.linear.asymmetric {
                true => format!("0 to {}", 2 * middle - 1),
                false => format!("{middle}: the config says that it is symmetric"),
            };
            let fault = QuantizedFault::Zero { tensor: name.clone(), output, group, found: found + middle, wanted };
            return Err(fault.into());
        }
    }
    let scattered = layer.packing.row(bits, layer.input).is_none();
    let integers = if scattered { whole(weights, &layer.integers)? } else { Vec::new() };
    Ok(Prepared { scales, zeros, integers })
}

/// Rows of (q - z) s where `dequantized`, else of (q - 8) s.
pub(super) fn matrix(
    weights: &Weights,
    layer: &Layer,
    prepared: &Prepared,
    rows: Range<usize>,
    dequantized: bool,
) -> Result<Vec<f32>, CheckpointError> {
    let Layer { out, input, groups, bits, packing, .. } = *layer;
    let read;
    let bytes = match packing.row(bits, input) {
        None => &prepared.integers,
        Some((line, shared)) => {
            let (first, last) = (rows.start / shared, rows.end.div_ceil(shared));
            let mut bytes = vec![0; (last - first) * line];
            weights.read_into(&layer.integers, (first * line) as u64, &mut bytes)?;
            read = bytes;
            &read
        }
    };
    let found = integers::unpack(packing, bits, [out, input], rows.clone(), bytes);
    let mut values = Vec::with_capacity(found.len());
    let group = input / groups;
    for (row, found) in rows.zip(found.chunks_exact(input)) {
        for (index, found) in found.chunks_exact(group).enumerate() {
            let at = index * out + row;
            let zero = if dequantized { prepared.zeros.get(at).copied().unwrap_or(0) } else { 0 };
            values.extend(found.iter().map(|found| (i32::from(*found) - zero) as f32 * prepared.scales[at]));
        }
    }
    Ok(values)
}

/// GPTQ may have sorted inputs by importance before it grouped them: then no group is a block of the matrix.
pub(super) fn check_order(weights: &Weights, layer: &Layer) -> Result<(), CheckpointError> {
    let Some(name) = &layer.order else { return Ok(()) };
    let bytes = whole(weights, name)?;
    let group = layer.input / layer.groups;
    for (input, bytes) in bytes.as_chunks::<4>().0.iter().enumerate() {
        let (found, wanted) = (i32::from_le_bytes(*bytes), input / group);
        if usize::try_from(found) != Ok(wanted) {
            return Err(QuantizedFault::Order { tensor: name.clone(), input, found, wanted }.into());
        }
    }
    Ok(())
}

pub(super) fn check_sizes(weights: &Weights, layer: &Layer) -> Result<(), CheckpointError> {
    let Some(name) = &layer.sizes else { return Ok(()) };
    let bytes = whole(weights, name)?;
    let found: Vec<i64> = match bytes.len() {
        8 => bytes.as_chunks::<4>().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
        _ => bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
    };
    let wanted = vec![layer.out, layer.input];
    if found.iter().map(|size| usize::try_from(*size).ok()).eq(wanted.iter().copied().map(Some)) {
        return Ok(());
    }
    let packed = layer.integers.clone();
    Err(QuantizedFault::WrongSizes { tensor: name.clone(), packed, found, wanted }.into())
}

//! Stored matrices: `[in, out]`, int4 two a byte with the low nibble first, scales `[out]` or `[in / group, out]`.
//! A stored matrix is cut and joined without quantizing again, so shards joined are the whole, bit for bit.
use crate::convert;
use crate::{QuantError, Stored};
use graphs::{DType, Weight};

/// Quantized values of packed bytes, in stored order: one per byte for int8, low nibble first for int4.
pub fn unpack(dtype: DType, bytes: &[u8]) -> Vec<i8> {
    match dtype {
        DType::Int4 => bytes.iter().flat_map(|byte| [(byte << 4) as i8 >> 4, *byte as i8 >> 4]).collect(),
        _ => bytes.iter().map(|byte| *byte as i8).collect(),
    }
}

/// Packs quantized values in stored order: the inverse of [`unpack`]. An odd last int4 fills half a byte.
pub fn pack(dtype: DType, values: &[i8]) -> Vec<u8> {
    match dtype {
        DType::Int4 => {
            values.chunks(2).map(|pair| pair[0] as u8 & 15 | pair.get(1).map_or(0, |high| (*high as u8) << 4)).collect()
        }
        _ => values.iter().map(|value| *value as u8).collect(),
    }
}

/// Sides of the square blocks in which matrices are transposed.
const SIDE: usize = 32;

/// Dequantized values `[out, in]` of a stored matrix `[in, out]`.
pub(crate) fn dequantize(stored: &Stored, scale: &Stored) -> Vec<f32> {
    let [input, out] = stored.shape[..] else { return Vec::new() };
    let quantized = unpack(stored.dtype, &stored.bytes);
    let scales = convert::to_f32(scale.dtype, &scale.bytes);
    let group = input / (scales.len() / out.max(1)).max(1);
    let mut values = vec![0.0; input * out];
    for (block, rows) in values.chunks_mut((SIDE * input).max(1)).enumerate() {
        for first in (0..input).step_by(SIDE) {
            for (row, values) in rows.chunks_exact_mut(input).enumerate() {
                let channel = block * SIDE + row;
                for at in first..input.min(first + SIDE) {
                    values[at] = f32::from(quantized[at * out + channel]) * scales[at / group * out + channel];
                }
            }
        }
    }
    values
}

/// `start..end` of one logical axis (0 is out, 1 is in) of a stored matrix. `weight` names it in errors.
/// An int4 matrix is cut on group bounds along `in`, at even places along `out`.
pub(crate) fn slice(
    weight: &Weight,
    whole: &Stored,
    axis: usize,
    start: usize,
    end: usize,
) -> Result<Stored, QuantError> {
    let (Some(scale), [input, out]) = (&whole.scale, &whole.shape[..]) else {
        return Err(QuantError::Expression { weight: weight.key(), reason: "it is no quantized matrix".into() });
    };
    let size = if axis == 0 { *out } else { *input };
    if axis > 1 || start > end || end > size {
        let reason = format!("a slice of shape {:?} is out of bounds", [out, input]);
        return Err(QuantError::Expression { weight: weight.key(), reason });
    }
    // A scale of one row belongs to all inputs: int8, and int4 per output channel.
    let group = match scale.shape[..] {
        [groups, _] if groups > 0 => input / groups,
        _ => 1,
    };
    let step = if axis == 1 { group } else { 8 / whole.dtype.bits() };
    if !start.is_multiple_of(step) || !end.is_multiple_of(step) {
        return Err(QuantError::SliceStep { weight: weight.key(), axis, start, end, step });
    }
    let scale = match (axis, whole.dtype) {
        (0, _) => columns(scale, *out, start, end),
        (_, DType::Int8) => Stored::clone(scale),
        _ => rows(scale, *out, start / group, end / group),
    };
    let payload = if axis == 0 { columns(whole, *out, start, end) } else { rows(whole, *out, start, end) };
    Ok(Stored { scale: Some(Box::new(scale)), ..payload })
}

fn rows(whole: &Stored, width: usize, start: usize, end: usize) -> Stored {
    let row = whole.dtype.bytes(width);
    let bytes = whole.bytes[start * row..end * row].to_vec();
    Stored { dtype: whole.dtype, shape: vec![end - start, width], bytes, scale: None }
}

fn columns(whole: &Stored, width: usize, start: usize, end: usize) -> Stored {
    let bytes = |count| whole.dtype.bytes(count);
    let cut = |row: &[u8]| row[bytes(start)..bytes(end)].to_vec();
    let mut shape = whole.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = end - start;
    }
    Stored {
        dtype: whole.dtype,
        shape,
        bytes: whole.bytes.chunks_exact(bytes(width).max(1)).flat_map(cut).collect(),
        scale: None,
    }
}

/// Joins stored matrices along one logical axis (0 is out, 1 is in).
pub(crate) fn concat(weight: &Weight, axis: usize, parts: &[Stored]) -> Result<Stored, QuantError> {
    let refuse = |reason: String| Err(QuantError::Expression { weight: weight.key(), reason });
    let Some(first) = parts.first() else { return refuse("there are no parts".into()) };
    let mut scales = Vec::new();
    for part in parts {
        let (Some(scale), Some(wanted)) = (&part.scale, &first.scale) else {
            return refuse("quantized and plain parts do not join".into());
        };
        let group = |stored: &Stored, scale: &Stored| match scale.shape[..] {
            [groups, _] if groups > 0 => stored.shape[0] / groups,
            _ => 0,
        };
        if part.dtype != first.dtype || group(part, scale) != group(first, wanted) || axis > 1 {
            return refuse("parts of different formats do not join".into());
        }
        if part.shape[axis] != first.shape[axis] {
            return refuse(format!("stored shapes {:?} and {:?} do not join", first.shape, part.shape));
        }
        if axis == 1 && part.dtype == DType::Int8 && scale != wanted {
            return refuse(
                "int8 parts with different scales do not join along their inputs: join, then quantize".into(),
            );
        }
        scales.push(scale.as_ref());
    }
    let payloads: Vec<&Stored> = parts.iter().collect();
    let scale = match (axis, first.dtype) {
        (0, _) => beside(&scales),
        (_, DType::Int8) => scales[0].clone(),
        _ => below(&scales),
    };
    let payload = if axis == 0 { beside(&payloads) } else { below(&payloads) };
    Ok(Stored { scale: Some(Box::new(scale)), ..payload })
}

fn below(parts: &[&Stored]) -> Stored {
    let shape = vec![parts.iter().map(|part| part.shape[0]).sum(), parts[0].shape[1]];
    let bytes = parts.iter().flat_map(|part| part.bytes.iter().copied()).collect();
    Stored { dtype: parts[0].dtype, shape, bytes, scale: None }
}

fn beside(parts: &[&Stored]) -> Stored {
    let dtype = parts[0].dtype;
    let width = |part: &Stored| part.shape.last().copied().unwrap_or_default();
    let mut shape = parts[0].shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = parts.iter().map(|part| width(part)).sum();
    }
    let rows: usize = parts[0].shape.iter().rev().skip(1).product();
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.bytes.len()).sum());
    for row in 0..rows {
        for part in parts {
            let length = dtype.bytes(width(part));
            bytes.extend_from_slice(&part.bytes[row * length..(row + 1) * length]);
        }
    }
    Stored { dtype, shape, bytes, scale: None }
}

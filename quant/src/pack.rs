//! Stored matrices: `[in, out]`, int4 two a byte with the low nibble first, scales `[out]` or `[in / group, out]`.
//! A stored matrix is cut and joined without quantizing again, so shards joined are the whole, bit for bit.
use crate::check::refuse;
use crate::{QuantError, Stored, convert};
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

/// `start..end` of one logical axis (0 is out, 1 is in) of a stored matrix, checked to cut no scale and no byte.
pub(crate) fn slice(
    weight: &Weight,
    whole: &Stored,
    axis: usize,
    start: usize,
    end: usize,
) -> Result<Stored, QuantError> {
    let (Some(scale), [input, out]) = (&whole.scale, &whole.shape[..]) else {
        return refuse(weight, "it is no quantized matrix".into());
    };
    let (payload, scale) = match (axis, &scale.shape[..]) {
        (0, _) => (columns(whole, *out, start, end), columns(scale, *out, start, end)),
        (_, [groups, _]) => {
            let group = (input / (*groups).max(1)).max(1);
            (rows(whole, *out, start, end), rows(scale, *out, start / group, end.div_ceil(group)))
        }
        // One row of scales is for all inputs.
        _ => (rows(whole, *out, start, end), Stored::clone(scale)),
    };
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

/// Joins stored matrices along one logical axis (0 is out, 1 is in), checked to be of one format and to fit.
pub(crate) fn concat(weight: &Weight, axis: usize, parts: &[Stored]) -> Result<Stored, QuantError> {
    // A part of no weights has scales of nothing.
    let payloads: Vec<&Stored> = parts.iter().filter(|part| !part.bytes.is_empty()).collect();
    let scales: Vec<&Stored> = payloads.iter().filter_map(|part| part.scale.as_deref()).collect();
    let (Some(first), Some(scale)) = (payloads.first(), scales.first()) else {
        return refuse(weight, "there are no quantized parts".into());
    };
    if axis == 1 && first.dtype == DType::Int8 && scales.iter().any(|other| other != scale) {
        let reason = "int8 parts with different scales do not join along their inputs: join, then quantize";
        return refuse(weight, reason.into());
    }
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

//! The ops, written plainly. Each returns what does not fit instead of failing.
use super::array::{Array, Data};
use super::matmul::multiply;
use crate::{ActivationKind, BinaryKind, NormKind, OwnIds};
use rayon::prelude::*;

type Result = std::result::Result<Array, String>;

pub(super) fn linear(x: &Array, weight: &[f32], out: usize, width: usize) -> Result {
    let mut shape = x.shape.clone();
    shape.pop();
    shape.push(out);
    let rows = x.len() / width;
    Ok(Array::float(shape, multiply(x.floats()?, weight, [rows, width, out], true, true)))
}

pub(super) fn bias_add(x: &Array, bias: &[f32]) -> Result {
    let mut data = x.floats()?.to_vec();
    for row in data.chunks_exact_mut(bias.len()) {
        for (value, bias) in std::iter::zip(row, bias) {
            *value += bias;
        }
    }
    Ok(Array::float(x.shape.clone(), data))
}

pub(super) fn norm(x: &Array, kind: NormKind, weight: &[f32], bias: Option<&[f32]>, epsilon: f32) -> Result {
    let width = x.width();
    let mut data = x.floats()?.to_vec();
    data.par_chunks_exact_mut(width).for_each(|row| {
        let mean = match kind {
            NormKind::Layer => row.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64,
            NormKind::Rms => 0.0,
        };
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (variance + f64::from(epsilon)).sqrt();
        for (i, value) in row.iter_mut().enumerate() {
            *value = ((f64::from(*value) - mean) * scale) as f32 * weight[i] + bias.map_or(0.0, |bias| bias[i]);
        }
    });
    Ok(Array::float(x.shape.clone(), data))
}

pub(super) fn activation(x: &Array, kind: ActivationKind) -> Result {
    let sigmoid = |v: f32| 1.0 / (1.0 + (-v).exp());
    let function = |v: f32| match kind {
        ActivationKind::Relu => v.max(0.0),
        ActivationKind::Silu => v * sigmoid(v),
        ActivationKind::Gelu => 0.5 * v * (1.0 + libm::erff(v * std::f32::consts::FRAC_1_SQRT_2)),
        ActivationKind::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (v + 0.044715 * v * v * v);
            0.5 * v * (1.0 + inner.tanh())
        }
        ActivationKind::QuickGelu => v * sigmoid(1.702 * v),
    };
    Ok(Array::float(x.shape.clone(), x.floats()?.par_iter().with_min_len(4096).map(|&v| function(v)).collect()))
}

pub(super) fn scale(x: &Array, factor: f32) -> Result {
    Ok(Array::float(x.shape.clone(), x.floats()?.iter().map(|value| value * factor).collect()))
}

/// Arrays of x's shape joined along its last axis.
pub(super) fn beside(x: &Array, parts: &[Vec<f32>]) -> Result {
    let (width, mut shape) = (x.width(), x.shape.clone());
    if let Some(last) = shape.last_mut() {
        *last *= parts.len();
    }
    if parts.iter().any(|part| part.len() != x.len()) {
        return Err("the ranks have parts of different sizes".into());
    }
    let rows = 0..x.len() / width.max(1);
    let row = |row: usize| parts.iter().flat_map(move |part| &part[row * width..(row + 1) * width]);
    Ok(Array::float(shape, rows.flat_map(row).copied().collect()))
}

pub(super) fn scale_by(x: &Array, weight: &[f32], divide: bool) -> Result {
    let mut data = x.floats()?.to_vec();
    for row in data.chunks_exact_mut(weight.len()) {
        for (value, factor) in std::iter::zip(row, weight) {
            *value = if divide { *value / factor } else { *value * factor };
        }
    }
    Ok(Array::float(x.shape.clone(), data))
}

fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| most.max(value.abs()))
}

/// `[..., ranks]`, zeros but for this rank's place.
pub(super) fn largest(x: &Array, rank: usize, ranks: usize) -> Result {
    let (width, mut shape) = (x.width(), x.shape.clone());
    let mut data = Vec::with_capacity(x.len() / width.max(1) * ranks);
    for token in x.floats()?.chunks_exact(width.max(1)) {
        data.extend((0..ranks).map(|place| if place == rank { largest_magnitude(token) } else { 0.0 }));
    }
    if let Some(last) = shape.last_mut() {
        *last = ranks;
    }
    Ok(Array::float(shape, data))
}

/// Each token by `scale`, or by its own: by the largest of its numbers in `most`, or of itself.
pub(super) fn quantize_input(x: &Array, scale: Option<f32>, most: Option<&[f32]>, wide: bool) -> Result {
    let mut data = x.floats()?.to_vec();
    round_tokens(&mut data, x.width(), scale, most, wide);
    Ok(Array::float(x.shape.clone(), data))
}

/// What [`crate::Op::QuantizeInput`] makes of tokens `[.., width]`.
pub fn round_tokens(values: &mut [f32], width: usize, scale: Option<f32>, most: Option<&[f32]>, wide: bool) {
    let steps = if wide { 127.5 } else { 127.0 };
    let each = most.map_or(0, |most| most.len() / (values.len() / width.max(1)).max(1));
    values.par_chunks_exact_mut(width.max(1)).enumerate().for_each(|(at, token)| {
        let most = largest_magnitude(most.and_then(|most| most.get(at * each..(at + 1) * each)).unwrap_or(token));
        let scale = scale.unwrap_or(if most > 0.0 { most / steps } else { 1.0 });
        token.iter_mut().for_each(|value| *value = nearest((*value / scale).clamp(-128.0, 127.0)) * scale);
    });
}

/// Adding this to a float of at most 2^22 leaves its rounded value, half to even, in the low bits.
pub const ROUNDER: f32 = 12_582_912.0;

/// [`f32::round_ties_even`] of a small number, without a call where the processor's oldest instructions have to do.
#[inline(always)]
pub fn nearest(value: f32) -> f32 {
    value + ROUNDER - ROUNDER
}

pub(super) fn binary(a: &Array, b: &Array, kind: BinaryKind) -> Result {
    let pairs = std::iter::zip(a.floats()?, b.floats()?);
    let data = match kind {
        BinaryKind::Add => pairs.map(|(a, b)| a + b).collect(),
        BinaryKind::Multiply => pairs.map(|(a, b)| a * b).collect(),
    };
    Ok(Array::float(a.shape.clone(), data))
}

/// Patches are laid out as rows of a matrix, then multiplied.
pub(super) fn conv(x: &Array, weight: &[f32], shape: &[usize], stride: usize) -> Result {
    let (&[out, channels, height, width], &[batch, _, rows, columns]) = (shape, &x.shape[..]) else {
        return Err(format!("weight {shape:?} and input {:?} have other ranks", x.shape));
    };
    let (down, across) = ((rows - height) / stride + 1, (columns - width) / stride + 1);
    let data = x.floats()?;
    let size = channels * height * width;
    let mut patches = Vec::with_capacity(batch * down * across * size);
    for picture in data.chunks_exact(channels * rows * columns).take(batch) {
        for (y, x) in (0..down).flat_map(|y| (0..across).map(move |x| (y * stride, x * stride))) {
            for (channel, row) in (0..channels).flat_map(|channel| (0..height).map(move |row| (channel, row))) {
                let start = (channel * rows + y + row) * columns + x;
                patches.extend_from_slice(&picture[start..start + width]);
            }
        }
    }
    let places = down * across;
    let product = multiply(&patches, weight, [batch * places, size, out], true, true);
    transpose(&Array::float([batch, places, out], product), &[0, 2, 1])
        .map(|array| Array { shape: vec![batch, out, down, across], ..array })
}

pub(super) fn embed(ids: &Array, table: &[f32], shape: &[usize], own: Option<&OwnIds>) -> Result {
    let (vocab, hidden) = (shape[0], shape[1]);
    let mut data = Vec::with_capacity(ids.len() * hidden);
    for &id in ids.ints()? {
        let id = usize::try_from(id).map_err(|_| format!("token id {id} is negative"))?;
        match own.map_or(Some(id.min(vocab - 1)), |own| own.row_of(id)) {
            Some(row) => data.extend_from_slice(&table[row * hidden..(row + 1) * hidden]),
            None => data.resize(data.len() + hidden, 0.0),
        }
    }
    let shape = ids.shape.iter().copied().chain([hidden]).collect::<Vec<_>>();
    Ok(Array::float(shape, data))
}

pub(super) fn splice(x: &Array, ids: &Array, table: &Array, vocab: usize) -> Result {
    let width = x.width();
    let mut data = x.floats()?.to_vec();
    let (table, rows) = (table.floats()?, table.shape[0]);
    for (row, &id) in std::iter::zip(data.chunks_exact_mut(width), ids.ints()?) {
        if let Some(place) = usize::try_from(id).ok().and_then(|id| id.checked_sub(vocab)) {
            if place >= rows {
                return Err(format!("id {id} is row {place} of a prompt table of {rows} rows"));
            }
            row.copy_from_slice(&table[place * width..(place + 1) * width]);
        }
    }
    Ok(Array::float(x.shape.clone(), data))
}

pub(super) fn broadcast(like: &Array, weight: &[f32], shape: &[usize]) -> Result {
    let batch = like.shape[0];
    Ok(Array::float([&[batch], shape].concat(), weight.repeat(batch)))
}

pub(super) fn concat(inputs: &[&Array], axis: usize) -> Result {
    let mut shape = inputs[0].shape.clone();
    shape[axis] = inputs.iter().map(|input| input.shape[axis]).sum();
    let outer: usize = shape[..axis].iter().product();
    let mut data = Vec::with_capacity(shape.iter().product());
    for index in 0..outer {
        for input in inputs {
            let size = input.len() / outer;
            data.extend_from_slice(&input.floats()?[index * size..(index + 1) * size]);
        }
    }
    Ok(Array::float(shape, data))
}

pub(super) fn slice(x: &Array, axis: usize, start: usize, end: usize) -> Result {
    let mut shape = x.shape.clone();
    let inner: usize = shape[axis + 1..].iter().product();
    let step = shape[axis] * inner;
    shape[axis] = end - start;
    let rows = x.floats()?.chunks_exact(step);
    let data = rows.flat_map(|row| row[start * inner..end * inner].iter().copied()).collect();
    Ok(Array::float(shape, data))
}

pub(super) fn pad(x: &Array, axis: usize, after: usize) -> Result {
    let mut shape = x.shape.clone();
    let inner: usize = shape[axis + 1..].iter().product();
    let step = shape[axis] * inner;
    shape[axis] += after;
    let mut data = Vec::with_capacity(shape.iter().product());
    for row in x.floats()?.chunks_exact(step.max(1)) {
        data.extend_from_slice(row);
        data.resize(data.len() + after * inner, 0.0);
    }
    Ok(Array::float(shape, data))
}

pub(super) fn roll(x: &Array, axis: usize, by: usize) -> Result {
    let inner: usize = x.shape[axis + 1..].iter().product();
    let mut data = x.floats()?.to_vec();
    data.chunks_exact_mut((x.shape[axis] * inner).max(1)).for_each(|row| row.rotate_left(by * inner));
    Ok(Array::float(x.shape.clone(), data))
}

pub(super) fn transpose(x: &Array, permutation: &[usize]) -> Result {
    let rank = x.shape.len();
    let mut strides = vec![1; rank];
    for axis in (0..rank.saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * x.shape[axis + 1];
    }
    let shape: Vec<usize> = permutation.iter().map(|&axis| x.shape[axis]).collect();
    let strides: Vec<usize> = permutation.iter().map(|&axis| strides[axis]).collect();
    let data = x.floats()?;
    let mut result = Vec::with_capacity(data.len());
    let mut index = vec![0; rank];
    let mut place = 0;
    for _ in 0..data.len() {
        result.push(data[place]);
        for axis in (0..rank).rev() {
            index[axis] += 1;
            place += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            place -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    Ok(Array { shape, data: Data::Float(result) })
}

pub(super) fn last_token(x: &Array, last: &Array) -> Result {
    let &[batch, tokens, width] = &x.shape[..] else { return Err(format!("wanted 3 dimensions, found {:?}", x.shape)) };
    let data = x.floats()?;
    let mut result = Vec::with_capacity(batch * width);
    for (request, &index) in last.ints()?.iter().enumerate() {
        let index = usize::try_from(index).ok().filter(|&index| index < tokens);
        let row = request * tokens + index.ok_or_else(|| format!("last token outside the {tokens} tokens"))?;
        result.extend_from_slice(&data[row * width..(row + 1) * width]);
    }
    Ok(Array::float([batch, width], result))
}

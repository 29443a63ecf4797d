//! Scaled dot-product attention (Vaswani et al. 2017) with grouped heads, rotary positions and an in-place cache.
use super::Slot;
use super::array::Array;
use super::matmul::multiply;
use crate::{Attention, Mask, RelativeBias, WindowBias, int8_row};
use rayon::prelude::*;

type Result<T> = std::result::Result<T, String>;

/// What is added to the scores, with its table's values.
#[derive(Clone, Copy)]
pub(super) enum Bias<'b> {
    None,
    Distance(&'b RelativeBias, &'b [f32]),
    Window(&'b WindowBias, &'b [f32]),
}

impl Bias<'_> {
    /// For head `head` of `heads` and two places.
    fn of(self, (head, heads): (usize, usize), query: usize, key: usize) -> f32 {
        match self {
            Bias::None => 0.0,
            Bias::Distance(bias, table) => table[bias.bucket(key as i64 - query as i64) * heads + head],
            Bias::Window(bias, table) => {
                let each = heads / bias.windows();
                table[bias.row(query, key) * each + head % each] + bias.wall(head / each, query, key)
            }
        }
    }
}

/// `[batch, tokens, heads * dim]` to `[batch, heads, tokens, dim]`.
fn by_head(x: &Array, heads: usize, dim: usize) -> Result<Vec<f32>> {
    let (batch, tokens) = (x.shape[0], x.shape[1]);
    let data = x.floats()?;
    let mut result = vec![0.0; data.len()];
    for (row, source) in data.chunks_exact(dim).enumerate() {
        let (place, head) = (row / heads, row % heads);
        let (request, token) = (place / tokens, place % tokens);
        let target = ((request * heads + head) * tokens + token) * dim;
        result[target..target + dim].copy_from_slice(source);
    }
    debug_assert_eq!(batch * tokens * heads * dim, result.len());
    Ok(result)
}

/// Rotates `[batch, heads, tokens, dim]` in place: halves of a head turn together.
fn rotate(x: &mut [f32], attention: &Attention, positions: &Array, heads: usize) -> Result<()> {
    let Some(rope) = &attention.rope else { return Ok(()) };
    let (dim, tokens) = (attention.head_dim, positions.shape[1]);
    let frequencies = rope.frequencies(dim);
    let positions = positions.ints()?;
    for (row, values) in x.chunks_exact_mut(dim).enumerate() {
        let (request, token) = (row / (heads * tokens), row % tokens);
        let position = positions[request * tokens + token] as f32;
        let (low, high) = values.split_at_mut(dim / 2);
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sine, cosine) = (position * frequency).sin_cos();
            (low[i], high[i]) = (low[i] * cosine - high[i] * sine, high[i] * cosine + low[i] * sine);
        }
    }
    Ok(())
}

/// Attention over the keys given, all of them.
pub(super) fn plain(attention: &Attention, inputs: &[&Array], bias: Bias<'_>) -> Result<Array> {
    let (query, key) = (inputs[0], inputs[1]);
    let batch = query.shape[0];
    let mut q = by_head(query, attention.heads, attention.head_dim)?;
    let mut k = by_head(key, attention.kv_heads, attention.head_dim)?;
    if let (Some(positions), true) = (inputs.get(3), attention.rope.is_some()) {
        rotate(&mut q, attention, positions, attention.heads)?;
        rotate(&mut k, attention, positions, attention.kv_heads)?;
    }
    let v = by_head(inputs[2], attention.kv_heads, attention.head_dim)?;
    let rows = key.shape[1];
    let lengths = match inputs.last().filter(|_| attention.key_lengths) {
        Some(lengths) => lengths.ints()?.iter().map(|&length| (length.max(0) as usize).min(rows)).collect(),
        None => vec![rows; batch],
    };
    let extent = Extent { rows, past: &vec![0; batch], lengths: &lengths };
    Ok(mix(attention, query, [&q, &k, &v], extent, bias))
}

/// Writes the new keys and values at `past_lengths`, then attends over all rows up to each query's own.
pub(super) fn cached(
    attention: &Attention,
    inputs: &[&Array],
    slot: &mut Slot,
    (batch, rows): (usize, usize),
    bias: Bias<'_>,
) -> Result<Array> {
    let (heads, kv_heads, dim) = (attention.heads, attention.kv_heads, attention.head_dim);
    let query = inputs[0];
    let (found, tokens) = (query.shape[0], query.shape[1]);
    if found != batch || slot.shape.kv_heads != kv_heads || slot.shape.head_dim != dim {
        return Err(format!("the cache was made for {batch} requests, found {found}"));
    }
    let mut q = by_head(query, heads, dim)?;
    let mut k = by_head(inputs[1], kv_heads, dim)?;
    let mut v = by_head(inputs[2], kv_heads, dim)?;
    // The sequence lengths, the last input, only spare a kernel work: each query's own mask already ends at its row.
    let past = match inputs[3..] {
        [positions, past, _] => {
            rotate(&mut q, attention, positions, heads)?;
            rotate(&mut k, attention, positions, kv_heads)?;
            past
        }
        [past, _] => past,
        _ => return Err("lengths are missing".into()),
    };
    let past: Vec<usize> = past.ints()?.iter().map(|&length| usize::try_from(length).unwrap_or(usize::MAX)).collect();
    if let Some(length) = past.iter().find(|&&length| length.saturating_add(tokens) > rows) {
        return Err(format!("the cache of {rows} rows holds {length} tokens, {tokens} more do not fit"));
    }
    if attention.int8_cache {
        for rows in [&mut k, &mut v] {
            rows.par_chunks_exact_mut(dim).for_each(int8_row::round);
        }
    }
    for (request, &length) in past.iter().enumerate() {
        for head in request * kv_heads..(request + 1) * kv_heads {
            let (from, to, size) = (head * tokens * dim, (head * rows + length) * dim, tokens * dim);
            slot.keys[to..to + size].copy_from_slice(&k[from..from + size]);
            slot.values[to..to + size].copy_from_slice(&v[from..from + size]);
        }
    }
    let lengths: Vec<usize> = past.iter().map(|length| length + tokens).collect();
    let extent = Extent { rows, past: &past, lengths: &lengths };
    Ok(mix(attention, query, [&q, &slot.keys, &slot.values], extent, bias))
}

/// Rows of the keys and values, and which of them each request's queries see.
#[derive(Clone, Copy)]
struct Extent<'e> {
    rows: usize,
    /// Keys before the first query.
    past: &'e [usize],
    /// Keys that count.
    lengths: &'e [usize],
}

/// softmax(scale q k^T + bias + mask) v for each request and head; keys and values are `[batch, kv_heads, rows, dim]`.
fn mix(attention: &Attention, query: &Array, qkv: [&[f32]; 3], extent: Extent<'_>, bias: Bias<'_>) -> Array {
    let (heads, kv_heads, dim) = (attention.heads, attention.kv_heads, attention.head_dim);
    let (batch, tokens) = (query.shape[0], query.shape[1]);
    let causal = attention.mask == Mask::Causal;
    let [q, keys, values] = qkv;
    let mixed: Vec<Vec<f32>> = (0..batch * heads)
        .into_par_iter()
        .map(|row| {
            let (request, head) = (row / heads, row % heads);
            let (past, used) = (extent.past[request], extent.lengths[request]);
            let start = (request * kv_heads + head / (heads / kv_heads)) * extent.rows * dim;
            let (keys, values) = (&keys[start..start + used * dim], &values[start..start + used * dim]);
            let q = &q[row * tokens * dim..(row + 1) * tokens * dim];
            let mut scores = multiply(q, keys, [tokens, dim, used], true, false);
            for (token, scores) in scores.chunks_exact_mut(used.max(1)).enumerate() {
                let seen = if causal { past + token + 1 } else { used };
                scores.iter_mut().for_each(|score| *score *= attention.scale);
                if !matches!(bias, Bias::None) {
                    for (key, score) in scores.iter_mut().enumerate() {
                        *score += bias.of((head, heads), past + token, key);
                    }
                }
                softmax(scores, seen);
            }
            multiply(&scores, values, [tokens, used, dim], false, false)
        })
        .collect();
    let mut result = vec![0.0; query.len()];
    for (row, values) in mixed.iter().enumerate() {
        let (request, head) = (row / heads, row % heads);
        for (token, values) in values.chunks_exact(dim).enumerate() {
            let target = ((request * tokens + token) * heads + head) * dim;
            result[target..target + dim].copy_from_slice(values);
        }
    }
    Array::float(query.shape.clone(), result)
}

/// Over the first `seen` scores; the rest become 0.
fn softmax(scores: &mut [f32], seen: usize) {
    let (visible, hidden) = scores.split_at_mut(seen);
    hidden.fill(0.0);
    let largest = visible.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f32;
    for score in visible.iter_mut() {
        *score = (*score - largest).exp();
        sum += *score;
    }
    visible.iter_mut().for_each(|score| *score /= sum);
}

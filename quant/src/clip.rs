//! Scales below those of the largest magnitudes: a few weights are clipped so that the others are rounded more finely.
//! Where rows of inputs are known the products count (the clipping of AWQ, Lin et al. 2023, arXiv 2306.00978), else the
//! weights themselves (least squares).
use crate::round;
use crate::rounded::{group_of, round_by};
use graphs::interpret::multiply;
use graphs::{DType, Format};
use rayon::prelude::*;

/// Parts of the largest magnitude that are tried, from all of it down.
const STEPS: usize = 16;
const STEP: f32 = 1.0 / 32.0;

/// Outputs that one thread does in one go. Fixed, so that sums are the same for any number of threads.
const BLOCK: usize = 64;

/// The scales that lose least, in the format's own order, of a matrix `[out, in]`. `rows` are inputs `[.., in]`, none for
/// least squares.
///
/// The loss of a group of weights w with inputs X is |X (w - w')|^2 = d G d for G = X^T X over the group's inputs alone.
pub fn clip(weights: &[f32], input: usize, rows: &[f32], format: Format, compute: DType) -> Vec<f32> {
    let (group, outputs) = (group_of(format, input).max(1), weights.len() / input.max(1));
    let groups = input / group;
    let grams: Vec<Vec<f32>> =
        (0..groups).into_par_iter().map(|index| gram(rows, input, index * group, group)).collect();
    let mut found = vec![1.0; outputs * groups];
    found.par_chunks_mut((BLOCK * groups).max(1)).enumerate().for_each(|(block, found)| {
        let outputs = found.len() / groups;
        let first = block * BLOCK;
        for (index, gram) in grams.iter().enumerate() {
            let place = |output: usize| (first + output) * input + index * group;
            let of: Vec<f32> =
                (0..outputs).flat_map(|output| &weights[place(output)..place(output) + group]).copied().collect();
            for (output, scale) in best(&of, group, gram, format.limit(), compute).into_iter().enumerate() {
                found[output * groups + index] = scale;
            }
        }
    });
    match format {
        Format::Int8 => found,
        // Stored by group, then by output.
        Format::Int4 { .. } => {
            (0..groups).flat_map(|index| found.iter().skip(index).step_by(groups).copied()).collect()
        }
    }
}

/// X^T X of `group` inputs from `first` on; empty without rows.
fn gram(rows: &[f32], input: usize, first: usize, group: usize) -> Vec<f32> {
    if rows.is_empty() {
        return Vec::new();
    }
    let columns: Vec<f32> =
        (first..first + group).flat_map(|at| rows.iter().skip(at).step_by(input).copied()).collect();
    let count = rows.len() / input;
    multiply(&columns, &columns, [group, count, group], true, false)
}

/// For each row of `weights` the scale that loses least; the largest of equals.
fn best(weights: &[f32], group: usize, gram: &[f32], limit: f32, compute: DType) -> Vec<f32> {
    let outputs = weights.len() / group;
    let mut best = vec![(f64::INFINITY, 1.0f32); outputs];
    let mut off = vec![0.0; weights.len()];
    for step in 0..STEPS {
        let part = 1.0 - step as f32 * STEP;
        let mut scales = Vec::with_capacity(outputs);
        for (row, off) in std::iter::zip(weights.chunks_exact(group), off.chunks_exact_mut(group)) {
            let most = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            let scale = round::scale(most * part, limit, compute);
            off.copy_from_slice(row);
            round_by(off, scale, limit);
            std::iter::zip(&mut *off, row).for_each(|(off, value)| *off = value - *off);
            scales.push(scale);
        }
        let weighed =
            if gram.is_empty() { None } else { Some(multiply(&off, gram, [outputs, group, group], false, false)) };
        let weighed = weighed.as_deref().unwrap_or(&off);
        for (output, (best, scale)) in std::iter::zip(&mut best, scales).enumerate() {
            let place = output * group..(output + 1) * group;
            let pairs = std::iter::zip(&off[place.clone()], &weighed[place]);
            let loss: f64 = pairs.map(|(off, weighed)| f64::from(off * weighed)).sum();
            if loss < best.0 {
                *best = (loss, scale);
            }
        }
    }
    best.into_iter().map(|(_, scale)| scale).collect()
}

//! Matrices rounded to a format and back, on slices: what searches compare. `[out, in]`, scales as they are stored.
use crate::round;
use graphs::interpret::nearest;
use graphs::{DType, Format};

/// Inputs that share a scale.
pub(crate) fn group_of(format: Format, input: usize) -> usize {
    match format {
        Format::Int8 => input,
        Format::Int4 { group } => group,
    }
}

/// Each value replaced by the nearest that the format holds, where scales of type `compute` are the largest magnitudes'.
pub fn round_to_nearest(weights: &mut [f32], input: usize, format: Format, compute: DType) {
    let limit = format.limit();
    for values in weights.chunks_mut(group_of(format, input).max(1)) {
        let most = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        round_by(values, round::scale(most, limit, compute), limit);
    }
}

/// Values replaced by the nearest multiples of a scale.
pub(crate) fn round_by(values: &mut [f32], scale: f32, limit: f32) {
    let inverse = 1.0 / scale;
    for value in values {
        *value = nearest((*value * inverse).clamp(-limit - 1.0, limit)) * scale;
    }
}

/// Outputs that are rounded and multiplied in one go: few enough to stay in a core's cache, and no copy of a whole matrix.
pub(crate) const BLOCK: usize = 64;

/// Blocks of a matrix whose loss stands for all while factors are compared: outputs are much alike, and the losses of
/// candidates rise and fall together.
pub(crate) const SAMPLE: usize = 16;

/// At most so many blocks of a matrix's outputs, which stand for all, and how many times as many all are.
pub(crate) fn sampled(weights: &[f32], input: usize, most: usize) -> (Vec<&[f32]>, f64) {
    let blocks = weights.chunks((BLOCK * input).max(1));
    let step = blocks.len().div_ceil(most).max(1);
    let blocks: Vec<&[f32]> = blocks.step_by(step).collect();
    let seen = blocks.iter().map(|block| block.len()).sum::<usize>();
    (blocks, weights.len() as f64 / seen.max(1) as f64)
}

/// Columns times or by their factors.
pub fn scale_columns(weights: &mut [f32], factors: &[f32], scale: impl Fn(f32, f32) -> f32) {
    for row in weights.chunks_exact_mut(factors.len().max(1)) {
        std::iter::zip(row, factors).for_each(|(value, &factor)| *value = scale(*value, factor));
    }
}

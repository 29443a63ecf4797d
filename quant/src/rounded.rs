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

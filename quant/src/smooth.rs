//! SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): a factor for each input channel moves outliers of the activations,
//! which are divided by it, into the weights, which are multiplied.

/// The share of the difficulty that moves into the weights.
pub const ALPHA: f32 = 0.5;

/// Bounds of a factor: what is divided by it must stay within float16.
const LEAST: f32 = 1e-4;
const MOST: f32 = 1e4;

/// The largest magnitude of each input channel of a matrix `[out, in]`, joined with those in `most`.
pub fn join_column_absmax(weights: &[f32], most: &mut [f32]) {
    for row in weights.chunks_exact(most.len().max(1)) {
        for (most, value) in std::iter::zip(&mut *most, row) {
            *most = most.max(value.abs());
        }
    }
}

/// Factors by the largest magnitudes of each channel's activations and weights (equation 4); 1 where either has none.
pub fn smooth(activations: &[f32], weights: &[f32], alpha: f32) -> Vec<f32> {
    let factor = |(&activation, &weight): (&f32, &f32)| {
        if activation > 0.0 && weight > 0.0 {
            (activation.powf(alpha) / weight.powf(1.0 - alpha)).clamp(LEAST, MOST)
        } else {
            1.0
        }
    };
    std::iter::zip(activations, weights).map(factor).collect()
}

/// One scale for all channels, after smoothing; 1 where there is nothing.
pub fn activation_scale(activations: &[f32], factors: Option<&[f32]>) -> f32 {
    let factor = |channel: usize| factors.and_then(|factors| factors.get(channel)).copied().unwrap_or(1.0);
    let most = activations.iter().enumerate().fold(0.0f32, |most, (at, value)| most.max(value / factor(at)));
    if most > 0.0 { most / 127.0 } else { 1.0 }
}

//! Rotary position embeddings (RoFormer, Su et al. 2021; the half-rotation form of Hugging Face's LLaMA).
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    pub theta: f32,
    /// Positions the tables must cover.
    pub max_positions: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<RopeScaling>,
}

/// How the frequencies are stretched for longer contexts (`rope_scaling` of the config).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum RopeScaling {
    Linear { factor: f32 },
    Llama3 { factor: f32, low_freq_factor: f32, high_freq_factor: f32, original_max_positions: f32 },
}

impl Rope {
    /// `head_dim / 2` angular frequencies in radians per position, in f32 as Hugging Face computes them.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let base = |i: usize| 1.0 / self.theta.powf((2 * i) as f32 / head_dim as f32);
        (0..head_dim / 2).map(|i| self.scale(base(i))).collect()
    }

    fn scale(&self, frequency: f32) -> f32 {
        match self.scaling {
            None => frequency,
            Some(RopeScaling::Linear { factor }) => frequency / factor,
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }) => {
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                if wavelength < original_max_positions / high_freq_factor {
                    frequency
                } else if wavelength > original_max_positions / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth =
                        (original_max_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

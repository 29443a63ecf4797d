//! Random values by position: a value depends on the seed, the tensor's name and its place in the tensor alone, so that
//! any thread may draw any part.
use crate::random::{STEP, mix};
use graphs::{Node, Op, Weight};

/// Normal, nearly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Distribution {
    pub(super) mean: f32,
    pub(super) deviation: f32,
}

impl Distribution {
    /// What keeps a network's activations near 1 at any depth: matrices preserve the size of what they multiply, norms
    /// do what they do, biases hardly matter.
    pub(super) fn of(node: &Node, weight: &Weight) -> Distribution {
        let shape = weight.shape();
        let centered = |deviation| Distribution { mean: 0.0, deviation };
        match &node.op {
            Op::Norm { weight: factor, .. } if std::ptr::eq(factor, weight) => {
                Distribution { mean: 1.0, deviation: 0.1 }
            }
            Op::Embed { .. } | Op::Broadcast { .. } => centered(1.0),
            // Embeddings of positions are added as a matrix, biases as a vector.
            Op::BiasAdd { .. } if shape.len() > 1 => centered(1.0),
            Op::Linear { .. } | Op::Conv { .. } => {
                let inputs: usize = shape.iter().skip(1).product();
                centered((inputs.max(1) as f32).sqrt().recip())
            }
            _ => centered(0.01),
        }
    }
}

/// The values of one tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Generator {
    key: u64,
    distribution: Distribution,
}

/// The sum of four uniform numbers below 65536: its middle, and its standard deviation sqrt(4 (65536^2 - 1) / 12).
const MIDDLE: f32 = 131_070.0;
const DEVIATION: f32 = 37_837.227;

impl Generator {
    pub(super) fn new(seed: u64, name: &str, distribution: Distribution) -> Generator {
        let key = name.bytes().fold(mix(seed.wrapping_add(STEP)), |key, byte| mix(key ^ u64::from(byte)));
        Generator { key, distribution }
    }

    /// The values from `first` on.
    pub(super) fn fill(&self, first: u64, values: &mut [f32]) {
        let Distribution { mean, deviation } = self.distribution;
        let scale = deviation / DEVIATION;
        let mut state = self.key.wrapping_add(first.wrapping_mul(STEP));
        for value in values {
            let bits = mix(state);
            state = state.wrapping_add(STEP);
            let sum = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48);
            // Below 2^18, so that the conversions are exact.
            *value = mean + (sum as i32 as f32 - MIDDLE) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_nearly_normal_and_the_same_from_any_place() {
        let generator = Generator::new(7, "w", Distribution { mean: 0.5, deviation: 2.0 });
        let mut all = vec![0.0; 1 << 18];
        generator.fill(0, &mut all);
        let mut part = vec![0.0; 1000];
        generator.fill(12_345, &mut part);
        assert_eq!(part, all[12_345..13_345]);
        let moment = |power: i32| {
            let sum: f64 = all.iter().map(|&value| (f64::from(value - 0.5) / 2.0).powi(power)).sum();
            sum / all.len() as f64
        };
        assert!(moment(1).abs() < 0.01, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.01, "{}", moment(2));
        // A normal distribution has 3, the sum of four uniform numbers 2.7.
        assert!((moment(4) - 2.7).abs() < 0.05, "{}", moment(4));
    }

    #[test]
    fn neighbours_and_names_do_not_repeat_each_other() {
        let draw = |seed, name| {
            let mut values = vec![0.0; 1 << 16];
            Generator::new(seed, name, Distribution { mean: 0.0, deviation: 1.0 }).fill(0, &mut values);
            values
        };
        let correlation = |left: &[f32], right: &[f32]| {
            std::iter::zip(left, right).map(|(l, r)| l * r).sum::<f32>().abs() / left.len() as f32
        };
        let one = draw(0, "layers.0.weight");
        for other in [draw(1, "layers.0.weight"), draw(0, "layers.1.weight")] {
            assert!(correlation(&one, &other) < 0.02);
        }
        for distance in [1, 2, 64, 4096] {
            assert!(correlation(&one[distance..], &one[..one.len() - distance]) < 0.02);
        }
    }
}

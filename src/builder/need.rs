//! How much memory a build takes, from the sizes of its weights: what TensorRT makes of them, by measurements of whole builds
//! (README.md, "Building" and "Measured on a GPU"). Bounds, not means: a build reports what it really took.
use graphs::{Attention, DType, Format, Network, Node, Op, Weight};
use std::collections::BTreeSet;

/// Bytes on the host while one engine is built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// What the child has for itself.
    pub own: u64,
    /// The same and the pages of weights that it maps, which the system can take back at any time.
    pub resident: u64,
}

/// TensorRT-RTX: own memory as a multiple of the bytes of plain, INT8 and INT4 weights.
const RTX: [f64; 3] = [1.75, 1.85, 3.0];
/// What the library takes for itself, and its code and ours that is in memory.
const RTX_LIBRARY: f64 = 250e6;
const RTX_CODE: f64 = 400e6;
/// A multiple of the biases that it works out for windows with walls: at most so much in builds of nougat-base's shape.
const RTX_BIASES: f64 = 6.5;
/// TensorRT 10 takes more for itself, most of it CUDA's, and the weights once as numbers.
const TENSORRT_LIBRARY: f64 = 6.5e9;
const TENSORRT_CODE: f64 = 2e9;

impl Need {
    /// Of TensorRT-RTX, where a weight is stored in `stored` bytes.
    pub fn rtx(network: &Network, stored: &dyn Fn(&Weight) -> u64) -> Need {
        let factor = |weight: &Weight| match weight.format() {
            None => RTX[0],
            Some(Format::Int8) => RTX[1],
            Some(Format::Int4 { .. }) => RTX[2],
        };
        let weights = weights(network);
        let own = weights.iter().map(|weight| stored(weight) as f64 * factor(weight)).sum::<f64>();
        let mapped: u64 = weights.iter().map(|weight| stored(weight)).sum();
        let own = (RTX_LIBRARY + own + RTX_BIASES * bias_bytes(network)) as u64;
        Need { own, resident: own + mapped + RTX_CODE as u64 }
    }

    /// Of TensorRT 10.
    pub fn tensorrt(network: &Network, stored: &dyn Fn(&Weight) -> u64) -> Need {
        let weights = weights(network);
        let numbers: usize = weights.iter().map(|weight| network.dtype.bytes(weight.count())).sum();
        let mapped: u64 = weights.iter().map(|weight| stored(weight)).sum();
        let own = TENSORRT_LIBRARY as u64 + numbers as u64;
        Need { own, resident: own + mapped + TENSORRT_CODE as u64 }
    }

    /// Of engines of which at most `jobs` are built at once: whichever these are.
    pub fn side_by_side(mut each: Vec<Need>, jobs: usize) -> Need {
        let mut most = |key: fn(&Need) -> u64| {
            each.sort_by_key(|need| std::cmp::Reverse(key(need)));
            each.iter().take(jobs).map(key).sum()
        };
        Need { own: most(|need| need.own), resident: most(|need| need.resident) }
    }
}

/// What the process that starts the children has for itself: a weight is made whole, quantized from pieces, and its buffer is
/// kept for the next.
pub fn parent(largest: u64) -> u64 {
    PARENT + 3 * largest
}

const PARENT: u64 = 200_000_000;

/// Equal ones once.
fn weights(network: &Network) -> Vec<&Weight> {
    let mut seen = BTreeSet::new();
    network.weights().map(|(_, weight)| weight).filter(|weight| seen.insert(weight.key())).collect()
}

/// What TensorRT works out of the biases of windows with walls while it builds.
fn bias_bytes(network: &Network) -> f64 {
    let bytes = |node: &Node| match &node.op {
        Op::Attention(Attention { window_bias: Some(bias), heads, .. }) if bias.has_walls() => {
            DType::bytes(network.dtype, heads * bias.places() * bias.places()) as f64
        }
        _ => 0.0,
    };
    network.nodes.iter().map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_count_that_are_built_at_once() {
        let need = |own, resident| Need { own, resident };
        let each = vec![need(1, 9), need(5, 6), need(3, 7)];
        assert_eq!(Need::side_by_side(each.clone(), 1), need(5, 9));
        assert_eq!(Need::side_by_side(each.clone(), 2), need(8, 16));
        assert_eq!(Need::side_by_side(each, 8), need(9, 22));
        assert_eq!(Need::side_by_side(Vec::new(), 2), need(0, 0));
    }
}

//! How the channels that a layer reads follow from those of what makes them.
use graphs::Weight;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Channels {
    #[default]
    Same,
    /// Query heads that share a head of keys and values read the same of its channels.
    Shared { heads: usize, kv_heads: usize, head_dim: usize },
}

impl Channels {
    /// Channels made, where `width` are read.
    pub fn own(self, width: usize) -> usize {
        match self {
            Channels::Same => width,
            Channels::Shared { kv_heads, head_dim, .. } => kv_heads * head_dim,
        }
    }

    /// For each channel read the one that it comes from.
    fn sources(self, width: usize) -> Vec<usize> {
        match self {
            Channels::Same => (0..width).collect(),
            Channels::Shared { heads, kv_heads, head_dim } => {
                let head = |at: usize| at / head_dim / (heads / kv_heads.max(1)).max(1);
                (0..width).map(|at| head(at) * head_dim + at % head_dim).collect()
            }
        }
    }

    /// Values of the channels made, for those read.
    pub fn spread(self, own: &[f32], width: usize) -> Vec<f32> {
        self.sources(width).into_iter().filter_map(|source| own.get(source).copied()).collect()
    }

    /// [`Self::spread`] as an expression.
    pub fn spread_weight(self, vector: &Weight) -> Weight {
        let Channels::Shared { heads, kv_heads, head_dim } = self else { return vector.clone() };
        let head = |head: usize| {
            let start = head / (heads / kv_heads.max(1)).max(1) * head_dim;
            Weight::Slice { axis: 0, start, end: start + head_dim, of: Box::new(vector.clone()) }
        };
        Weight::Concat { axis: 0, parts: (0..heads).map(head).collect() }
    }

    /// Values of the channels read, joined to those made: the largest.
    pub fn most(self, wide: &[f32]) -> Vec<f32> {
        let mut own = vec![0.0f32; self.own(wide.len())];
        std::iter::zip(self.sources(wide.len()), wide)
            .for_each(|(source, value)| own[source] = own[source].max(*value));
        own
    }

    /// Likewise, the mean.
    pub fn mean(self, wide: &[f32]) -> Vec<f32> {
        let mut own = vec![0.0f32; self.own(wide.len())];
        std::iter::zip(self.sources(wide.len()), wide).for_each(|(source, value)| own[source] += value);
        let shared = (wide.len() / own.len().max(1)).max(1) as f32;
        own.iter_mut().for_each(|value| *value /= shared);
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_share_keys_share_factors() {
        let shared = Channels::Shared { heads: 4, kv_heads: 2, head_dim: 2 };
        assert_eq!(shared.own(8), 4);
        assert_eq!(shared.spread(&[1.0, 2.0, 3.0, 4.0], 8), [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]);
        let wide = [1.0, 9.0, 5.0, 2.0, 0.0, 1.0, 2.0, 3.0];
        assert_eq!(shared.most(&wide), [5.0, 9.0, 2.0, 3.0]);
        assert_eq!(shared.mean(&wide), [3.0, 5.5, 1.0, 2.0]);
        let vector = Weight::tensor("v", &[4]);
        assert_eq!(shared.spread_weight(&vector).shape(), [8]);
        assert_eq!(Channels::Same.spread_weight(&vector), vector);
    }
}

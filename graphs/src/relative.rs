//! Relative position bias (T5, Raffel et al. 2020, arXiv 1910.10683): a number for each head and bucket of distances.
//! Buckets as in `transformers/models/t5/modeling_t5.py`, `_relative_position_bucket`.
use crate::Weight;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelativeBias {
    /// `[buckets, heads]`.
    pub weight: Weight,
    pub buckets: usize,
    /// Keys this far away, and all further ones, share the last bucket.
    pub max_distance: usize,
    /// Keys behind and ahead have buckets of their own; else what lies ahead counts as distance 0.
    pub bidirectional: bool,
}

impl RelativeBias {
    /// Whether there is a bucket for every distance.
    pub(crate) fn is_sound(&self) -> bool {
        let half = self.buckets / if self.bidirectional { 4 } else { 2 };
        half > 0 && self.max_distance > half
    }

    /// The bucket of a key `distance` places after the query: near ones alone, further ones in logarithmic steps.
    pub fn bucket(&self, distance: i64) -> usize {
        let (buckets, offset, away) = if self.bidirectional {
            let half = self.buckets / 2;
            (half, if distance > 0 { half } else { 0 }, distance.unsigned_abs() as usize)
        } else {
            (self.buckets, 0, (-distance).max(0) as usize)
        };
        let exact = buckets / 2;
        if away < exact {
            return offset + away;
        }
        // In f32 and in this order, as PyTorch does it: at the borders of buckets the last digit decides.
        let steps = (away as f32 / exact as f32).ln() / (self.max_distance as f64 / exact as f64).ln() as f32;
        let further = exact + (steps * (buckets - exact) as f32) as usize;
        offset + further.min(buckets - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bias(bidirectional: bool) -> RelativeBias {
        RelativeBias { weight: Weight::tensor("b", &[32, 4]), buckets: 32, max_distance: 128, bidirectional }
    }

    /// Values of `T5Attention._relative_position_bucket` of transformers 5.23.
    #[test]
    fn buckets_are_those_of_transformers() {
        let both = |distance| bias(true).bucket(distance);
        assert_eq!([0, -1, -7, -8, -15, -16, -127, -128, -1000].map(both), [0, 1, 7, 8, 9, 10, 15, 15, 15]);
        assert_eq!([1, 7, 8, 15, 16, 127, 128, 1000].map(both), [17, 23, 24, 25, 26, 31, 31, 31]);
        let behind = |distance| bias(false).bucket(distance);
        assert_eq!([5, 0, -1, -15, -16, -31, -32, -127, -128].map(behind), [0, 0, 1, 15, 16, 21, 21, 31, 31]);
    }

    #[test]
    fn buckets_never_fall_with_distance() {
        for bidirectional in [false, true] {
            let bias = bias(bidirectional);
            assert!((0..2000).all(|away| bias.bucket(-away) <= bias.bucket(-away - 1) && bias.bucket(-away) < 32));
        }
    }
}

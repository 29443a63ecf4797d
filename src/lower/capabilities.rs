//! What each family of TensorRT can spell itself; the rest goes to our plugins.
use tensorrt_sys::Family;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Attention, cache update and rotary positions are layers.
    pub(super) native_attention: bool,
    /// Dequantization in blocks takes tensors of any rank, not matrices only.
    pub(super) blocks_of_any_rank: bool,
    /// A bias added to a product with dequantized INT8 weights arrives. TensorRT 10.6 drops it in places: on an H100 the
    /// vision tower of fixtures/llava-hf in float32 came out as if the biases of its q, k, v, out, linear_1 and linear_2
    /// were zero, to seven digits, and right where they were not; INT4 weights keep theirs.
    pub(super) int8_keeps_bias: bool,
}

impl Capabilities {
    pub(super) fn of(family: Family) -> Capabilities {
        match family {
            Family::Rtx => Capabilities { native_attention: true, blocks_of_any_rank: true, int8_keeps_bias: true },
            // 11 has such layers too, but trtvlm has never run them.
            Family::Ten | Family::Eleven => {
                Capabilities { native_attention: false, blocks_of_any_rank: false, int8_keeps_bias: false }
            }
        }
    }
}

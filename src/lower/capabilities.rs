//! What each family of TensorRT can spell itself; the rest goes to our plugins.
use tensorrt_sys::Family;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Attention, cache update and rotary positions are layers.
    pub(super) native_attention: bool,
    /// Keys and values can be kept as INT8: our plugin does, TensorRT-RTX's cache layer has one type for all it touches.
    pub(super) int8_cache: bool,
    /// All-reduce and all-gather are layers; elsewhere they are a plugin.
    pub(super) native_collectives: bool,
    /// Dequantization in blocks takes tensors of any rank, not matrices only.
    pub(super) blocks_of_any_rank: bool,
    /// A bias added to a product with dequantized INT8 weights arrives. TensorRT 10.6 drops it in places: on an H100 the
    /// vision tower of fixtures/llava-hf in float32 came out as if the biases of its q, k, v, out, linear_1 and linear_2
    /// were zero, to seven digits, and right where they were not; INT4 weights keep theirs.
    pub(super) int8_keeps_bias: bool,
    /// The most outputs of a float32 product over rows of any number. For more TensorRT 10.6 finds no kernel ("Failed to
    /// find fallback kernel" on an H100, at 576 inputs: 16384 outputs build, 32768 do not; in pieces, transposed or
    /// swapped neither); the same as a convolution builds.
    pub(super) float32_outputs: usize,
}

impl Capabilities {
    pub(super) fn of(family: Family) -> Capabilities {
        match family {
            Family::Rtx => Capabilities {
                native_attention: true,
                int8_cache: false,
                native_collectives: true,
                blocks_of_any_rank: true,
                int8_keeps_bias: true,
                float32_outputs: usize::MAX,
            },
            // 11 has such layers too, but trtvlm has never run them.
            Family::Ten | Family::Eleven => Capabilities {
                native_attention: false,
                int8_cache: true,
                native_collectives: false,
                blocks_of_any_rank: false,
                int8_keeps_bias: false,
                float32_outputs: 16384,
            },
        }
    }
}

//! What each family of TensorRT can spell itself; the rest goes to our plugins.
use tensorrt_sys::Family;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Attention, cache update and rotary positions are layers.
    pub(super) native_attention: bool,
    /// Dequantization in blocks takes tensors of any rank, not matrices only.
    pub(super) blocks_of_any_rank: bool,
}

impl Capabilities {
    pub(super) fn of(family: Family) -> Capabilities {
        match family {
            Family::Rtx => Capabilities { native_attention: true, blocks_of_any_rank: true },
            // 11 has such layers too, but trtvlm has never run them.
            Family::Ten | Family::Eleven => Capabilities { native_attention: false, blocks_of_any_rank: false },
        }
    }
}

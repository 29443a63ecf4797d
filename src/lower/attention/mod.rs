//! Attention: native layers where the target has them, else our plugin over the cache, or plain layers without one.
mod mask;
mod native;
mod plain;
mod plugin;

use super::{LowerError, Lowering};
use graphs::{Attention, Node};
use tensorrt_sys as trt;

type Value<'n> = Result<trt::Tensor<'n>, LowerError>;

/// Names of a cache's tensors: the input, and the output that is bound to the same memory.
pub(crate) fn cache_names(kind: &str, slot: usize) -> [String; 2] {
    [format!("past_{kind}_{slot}"), format!("present_{kind}_{slot}")]
}

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn attention(&mut self, node: &Node, attention: &Attention) -> Value<'n> {
        match (self.capabilities.native_attention, attention.cache) {
            (true, _) => self.native_attention(node, attention),
            (false, Some(slot)) => self.plugin_attention(node, attention, slot),
            (false, None) => self.plain_attention(node, attention),
        }
    }

    /// A cache as an input of the network: `[batch, kv_heads, rows, head_dim]`.
    fn cache_input(&self, node: &Node, attention: &Attention, name: &str) -> Value<'n> {
        let sizes = [-1, attention.kv_heads as i64, self.sizes.max_seq_len as i64, attention.head_dim as i64];
        self.target.input(name, super::data_type(self.network.dtype), &sizes).map_err(Self::refused(node))
    }

    /// `[batch, tokens, heads * dim]` to `[batch, heads, tokens, dim]`.
    fn by_head(&self, node: &Node, part: &str, place: usize, heads: usize, dim: usize) -> Value<'n> {
        let sizes = [0, 0, heads as i64, dim as i64];
        let name = format!("{}/{part}", node.path);
        let x = self.value(node.inputs[place]);
        self.target.reshape_transpose(&name, x, &sizes, &[0, 2, 1, 3]).map_err(Self::refused(node))
    }

    /// `[batch, heads, tokens, dim]` to `[batch, tokens, heads * dim]`.
    fn by_token(&self, node: &Node, mixed: trt::Tensor<'n>, width: usize) -> Value<'n> {
        let name = |part: &str| format!("{}/{part}", node.path);
        let turned = self.target.transpose(&name("by_token"), mixed, &[0, 2, 1, 3]).map_err(Self::refused(node))?;
        self.target.reshape(&name("joined"), turned, &[0, 0, width as i64]).map_err(Self::refused(node))
    }
}

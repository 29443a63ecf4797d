//! Attention: native layers where the target has them, else our plugin over the cache, or plain layers without one.
mod mask;
mod native;
mod plain;
mod plugin;

use super::{LowerError, Lowering};
use graphs::{Attention, Cache, Node};
use tensorrt_sys as trt;

type Value<'n> = Result<trt::Tensor<'n>, LowerError>;

/// Names of a cache's tensors: the input, and the output that is bound to the same memory.
pub(crate) fn cache_names(kind: &str, slot: usize) -> [String; 2] {
    [format!("past_{kind}_{slot}"), format!("present_{kind}_{slot}")]
}

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn attention(&mut self, node: &Node, attention: &Attention) -> Value<'n> {
        if attention.int8_cache && !self.capabilities.int8_cache {
            let reason = "its cache is INT8, which this kind of engine has no layer for".to_owned();
            return Err(LowerError::Unsupported { path: node.path.clone(), reason });
        }
        match (self.capabilities.native_attention, attention.kept()) {
            (true, _) => self.native_attention(node, attention),
            (false, Some(cache)) => self.plugin_attention(node, attention, cache),
            (false, None) => self.plain_attention(node, attention),
        }
    }

    /// A cache as an input of the network: `[batch, kv_heads, rows, row_elements]`.
    fn cache_input(&self, node: &Node, cache: &Cache, name: &str) -> Value<'n> {
        let sizes = [-1, cache.kv_heads as i64, self.sizes.max_seq_len as i64, cache.row_elements() as i64];
        let dtype = super::data_type(cache.dtype(self.network.dtype));
        self.target.input(name, dtype, &sizes).map_err(Self::refused(node))
    }

    /// `[batch, tokens, heads * dim]` to `[batch, heads, tokens, dim]`.
    fn by_head(&self, node: &Node, attention: &Attention, part: &str, place: usize) -> Value<'n> {
        let dim = attention.head_dim as i64;
        let heads = if part == "query" { attention.heads } else { attention.kv_heads } as i64;
        let name = format!("{}/{part}", node.path);
        let x = self.value(node.inputs[place]);
        let Some(windows) = windows_apart(attention) else {
            let sizes = [0, 0, heads, dim];
            return self.target.reshape_transpose(&name, x, &sizes, &[0, 2, 1, 3]).map_err(Self::refused(node));
        };
        let (each, tokens) = (heads / windows, self.places(node));
        let turned = self.target.reshape_transpose(&name, x, &[0, 0, windows, each, dim], &[0, 2, 3, 1, 4]);
        let turned = turned.map_err(Self::refused(node))?;
        self.target.reshape(&format!("{name}/windows"), turned, &[-1, each, tokens, dim]).map_err(Self::refused(node))
    }

    /// `[batch, heads, tokens, dim]` to `[batch, tokens, heads * dim]`.
    fn by_token(&self, node: &Node, attention: &Attention, mixed: trt::Tensor<'n>) -> Value<'n> {
        let name = |part: &str| format!("{}/{part}", node.path);
        let (heads, dim) = (attention.heads as i64, attention.head_dim as i64);
        let width = heads * dim;
        if let Some(windows) = windows_apart(attention) {
            let sizes = [-1, windows, heads / windows, self.places(node), dim];
            let apart = self.target.reshape(&name("windows"), mixed, &sizes).map_err(Self::refused(node))?;
            let turned =
                self.target.transpose(&name("by_token"), apart, &[0, 3, 1, 2, 4]).map_err(Self::refused(node))?;
            return self.target.reshape(&name("joined"), turned, &[0, 0, width]).map_err(Self::refused(node));
        }
        let turned = self.target.transpose(&name("by_token"), mixed, &[0, 2, 1, 3]).map_err(Self::refused(node))?;
        self.target.reshape(&name("joined"), turned, &[0, 0, width]).map_err(Self::refused(node))
    }

    /// Tokens of a network that has them in its shape.
    fn places(&self, node: &Node) -> i64 {
        node.ty.shape.get(1).and_then(|dim| dim.fixed()).map_or(-1, |size| size as i64)
    }
}

/// How many windows become a part of the batch: without walls one bias does for all of them, which TensorRT would
/// otherwise write into the engine for each.
fn windows_apart(attention: &Attention) -> Option<i64> {
    let bias = attention.window_bias.as_ref().filter(|bias| !bias.has_walls())?;
    Some(bias.windows() as i64)
}

//! Attention by TensorRT-RTX's native layers: rotary embedding, cache update in place, fused attention.
use super::{Value, cache_names};
use crate::lower::{Lowering, data_type};
use graphs::{Attention, Cache, Mask, Node, Rope};
use tensorrt_sys as trt;
use trt::{AttentionOptions, CausalMaskKind, ElementWiseOperation};

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn native_attention(&mut self, node: &Node, attention: &Attention) -> Value<'n> {
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let head_dim = attention.head_dim;
        let mut query = self.by_head(node, attention, "query", 0)?;
        let mut key = self.by_head(node, attention, "key", 1)?;
        let mut value = self.by_head(node, attention, "value", 2)?;
        if let Some(rope) = &attention.rope {
            let positions = self.value(node.inputs[3]);
            query = self.rotate(node, "query", query, positions, rope, head_dim)?;
            key = self.rotate(node, "key", key, positions, rope, head_dim)?;
        }
        // The native layer applies no scale.
        let scale = self.number(&name("scale"), attention.scale, self.network.dtype, 4)?;
        query = self.target.elementwise(&name("scaled"), query, scale, ElementWiseOperation::Prod).map_err(refused())?;
        let mut options = AttentionOptions { causal: CausalMaskKind::None, mask: None, key_value_lengths: None };
        match (attention.kept(), &node.inputs[3 + usize::from(attention.rope.is_some())..]) {
            (Some(cache), &[past, sequence]) => {
                let past = self.value(past);
                let update = |kind, tensor| self.update_cache(node, &cache, kind, tensor, past);
                (key, value) = (update("key", key)?, update("value", value)?);
                options.key_value_lengths = Some(self.value(sequence));
                if attention.mask == Mask::Causal {
                    options.mask = Some(self.cache_mask(node, attention, past)?);
                }
            }
            (None, lengths) if attention.mask == Mask::None => {
                options.key_value_lengths = lengths.first().map(|lengths| self.value(*lengths));
                if let Some(bias) = &attention.relative_bias {
                    options.mask = Some(self.square_bias(node, attention, bias)?);
                }
                if let Some(bias) = &attention.window_bias {
                    options.mask = Some(self.window_bias(node, bias)?);
                }
            }
            _ if attention.mask == Mask::Causal => options.causal = CausalMaskKind::UpperLeft,
            _ => {}
        }
        let mixed = self.target.attention(&node.path, query, key, value, options).map_err(refused())?;
        self.by_token(node, attention, mixed)
    }

    fn rotate(
        &self,
        node: &Node,
        part: &str,
        x: trt::Tensor<'n>,
        positions: trt::Tensor<'n>,
        rope: &Rope,
        head_dim: usize,
    ) -> Value<'n> {
        let (dtype, rows) = (self.network.dtype, self.sizes.max_seq_len);
        let frequencies = rope.frequencies(head_dim);
        let table = |kind: &str, function: fn(f32) -> f32| -> Value<'n> {
            let angles = (0..rows).flat_map(|row| frequencies.iter().map(move |frequency| row as f32 * frequency));
            let values: Vec<f32> = angles.map(function).collect();
            let sizes = [rows as i64, head_dim as i64 / 2];
            let name = format!("{}/{part}/{kind}", node.path);
            Ok(self.target.constant(&name, data_type(dtype), &sizes, self.constants.floats(dtype, &values))?)
        };
        let (cosine, sine) = (table("cosine", f32::cos)?, table("sine", f32::sin)?);
        let name = format!("{}/{part}/rotated", node.path);
        self.target.rotary_embedding(&name, x, cosine, sine, positions).map_err(Self::refused(node))
    }

    /// Appends to a cache, which is an input and an output of the network.
    fn update_cache(
        &self,
        node: &Node,
        cache: &Cache,
        kind: &str,
        update: trt::Tensor<'n>,
        past: trt::Tensor<'n>,
    ) -> Value<'n> {
        let [input, output] = cache_names(kind, cache.slot);
        let refused = || Self::refused(node);
        let cache = self.cache_input(node, cache, &input)?;
        let name = format!("{}/{kind}/cached", node.path);
        let present = self.target.kv_cache_update(&name, cache, update, past).map_err(refused())?;
        self.target.mark_output(&output, present).map_err(refused())?;
        Ok(present)
    }
}

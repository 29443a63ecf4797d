//! Attention over a cache by our plugin, for targets whose own layers know no cache.
use super::mask::by_distance;
use super::{Value, cache_names};
use crate::lower::{LowerError, Lowering};
use crate::plugins::{AttentionPlugin, AttentionShape, LARGEST_HEAD};
use graphs::{Attention, Cache, Mask, Node, RelativeBias, Rope};
use tensorrt_sys as trt;

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn plugin_attention(&mut self, node: &Node, attention: &Attention, cache: Cache) -> Value<'n> {
        let refused = || Self::refused(node);
        let unsupported = |reason: &str| LowerError::Unsupported { path: node.path.clone(), reason: reason.to_owned() };
        let Attention { heads, kv_heads, head_dim, scale, .. } = *attention;
        if head_dim > LARGEST_HEAD || !head_dim.is_multiple_of(2) {
            let reason = format!("heads of {head_dim} dimensions; the plugin takes even ones up to {LARGEST_HEAD}");
            return Err(unsupported(&reason));
        }
        if attention.relative_bias.is_some() && attention.mask != Mask::Causal {
            return Err(unsupported("a bias by distance over a cache must have a causal mask here"));
        }
        let shape = AttentionShape {
            dtype: self.network.dtype,
            heads,
            kv_heads,
            head_dim,
            scale,
            rotary: attention.rope.is_some(),
            causal: attention.mask == Mask::Causal,
            bias: attention.relative_bias.is_some(),
            int8_cache: attention.int8_cache,
        };
        let plugin = AttentionPlugin::new(shape, self.compiler(node)?)?;
        let [past_key, present_key] = cache_names("key", cache.slot);
        let [past_value, present_value] = cache_names("value", cache.slot);
        let mut inputs: Vec<_> = node.inputs[..3].iter().map(|id| self.value(*id)).collect();
        inputs.push(self.cache_input(node, &cache, &past_key)?);
        inputs.push(self.cache_input(node, &cache, &past_value)?);
        let [lengths @ .., past, sequence] = &node.inputs[3..] else {
            return Err(unsupported("its lengths are missing"));
        };
        inputs.extend([self.value(*past), self.value(*sequence)]);
        if let (Some(rope), [positions]) = (&attention.rope, lengths) {
            inputs.extend([self.value(*positions), self.rotary_table(rope, head_dim)?]);
        }
        if let Some(bias) = &attention.relative_bias {
            inputs.push(self.bias_table(node, bias, heads)?);
        }
        let outputs = self.target.plugin(&node.path, &inputs, Box::new(plugin)).map_err(refused())?;
        let &[mixed, keys, values] = &outputs[..] else { return Err(unsupported("the plugin has other outputs")) };
        self.target.mark_output(&present_key, keys).map_err(refused())?;
        self.target.mark_output(&present_value, values).map_err(refused())?;
        Ok(mixed)
    }

    /// Cosine and sine of every position and frequency, float32 `[rows, head_dim / 2, 2]`; the same for all layers.
    fn rotary_table(&mut self, rope: &Rope, head_dim: usize) -> Value<'n> {
        if let Some((of, table)) = &self.rotary
            && of == rope
        {
            return Ok(*table);
        }
        let (rows, frequencies) = (self.sizes.max_seq_len, rope.frequencies(head_dim));
        let angles = (0..rows).flat_map(|row| frequencies.iter().map(move |frequency| row as f32 * frequency));
        let values: Vec<f32> = angles.flat_map(|angle| [angle.cos(), angle.sin()]).collect();
        let sizes = [rows as i64, frequencies.len() as i64, 2];
        let bytes = self.constants.floats(graphs::DType::Float32, &values);
        let name = format!("rotary_table/{}", self.values.len());
        let table = self.target.constant(&name, trt::DataType::Float, &sizes, bytes)?;
        self.rotary = Some((rope.clone(), table));
        Ok(table)
    }

    /// What is added to the score of a key 0, 1, 2 ... rows before the query's own, float32 `[heads, rows]`; the same for
    /// all layers.
    fn bias_table(&mut self, node: &Node, bias: &RelativeBias, heads: usize) -> Value<'n> {
        let key = bias.weight.key();
        if let Some((of, table)) = &self.bias
            && *of == key
        {
            return Ok(*table);
        }
        let (rows, stored) = (self.sizes.max_seq_len as i64, self.constants.get(&key)?);
        let values = by_distance(bias, &quant::to_f32(stored.dtype, stored.bytes), heads, (0..rows).map(|away| -away));
        let values = values.ok_or_else(|| Self::short_table(node))?;
        let bytes = self.constants.floats(graphs::DType::Float32, &values);
        let name = format!("bias_table/{}", self.values.len());
        let table = self.target.constant(&name, trt::DataType::Float, &[heads as i64, rows], bytes)?;
        self.bias = Some((key, table));
        Ok(table)
    }
}

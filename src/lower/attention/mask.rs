//! Additive masks of attention: what a query must not see, T5's bias by distance, Swin's by place in a window.
use super::Value;
use crate::lower::{LowerError, Lowering};
use graphs::{Attention, DType, Node, NodeId, RelativeBias, WindowBias};
use tensorrt_sys as trt;
use trt::ElementWiseOperation;

/// The bias of each head at each distance from the query's place to the key's, `[heads, distances]`, from a weight's values
/// `[buckets, heads]`; nothing where these are too few.
pub(super) fn by_distance(
    bias: &RelativeBias,
    values: &[f32],
    heads: usize,
    distances: impl Iterator<Item = i64> + Clone,
) -> Option<Vec<f32>> {
    let of = |head: usize| {
        let distances = distances.clone();
        distances.map(move |distance| values.get(bias.bucket(distance) * heads + head).copied())
    };
    (0..heads).flat_map(of).collect()
}

impl<'n> Lowering<'_, 'n, '_> {
    /// 0, or the relative bias, where cache row r <= past + i for new token i, else a low number:
    /// `[batch, 1 or heads, tokens, rows]`. One for all layers. The native causal masks align to the cache's end, not to
    /// each request's own length.
    pub(super) fn cache_mask(&mut self, node: &Node, attention: &Attention, past: trt::Tensor<'n>) -> Value<'n> {
        if let Some(mask) = self.mask {
            return Ok(mask);
        }
        let rows = self.sizes.max_seq_len;
        let index = self.token_index(node, 0, "mask", &[1, 1, -1, 1])?;
        let past = self.target.reshape("mask/past4", past, &[-1, 1, 1, 1]).map_err(Self::refused(node))?;
        let last = self.arithmetic(node, "mask/last", past, index, ElementWiseOperation::Sum)?;
        let numbers: Vec<i32> = (0..rows as i32).collect();
        let row = self.integers("mask/row", &numbers, &[1, 1, 1, rows as i64])?;
        let hidden = self.arithmetic(node, "mask/hidden", row, last, ElementWiseOperation::Greater)?;
        let seen = match &attention.relative_bias {
            Some(bias) => self.bias(node, attention, bias, "mask", row, last)?,
            None => self.number("mask/zero", 0.0, self.network.dtype, 4)?,
        };
        let mask = self.hide(node, "mask", hidden, seen)?;
        self.mask = Some(mask);
        Ok(mask)
    }

    /// The relative bias of attention without a cache, `[1, heads, tokens, tokens]`; one for all layers.
    pub(super) fn square_bias(&mut self, node: &Node, attention: &Attention, bias: &RelativeBias) -> Value<'n> {
        if let Some(mask) = self.mask {
            return Ok(mask);
        }
        let query = self.token_index(node, 0, "bias", &[1, 1, -1, 1])?;
        let key = self.target.reshape("bias/key", query, &[1, 1, 1, -1]).map_err(Self::refused(node))?;
        let mask = self.bias(node, attention, bias, "bias", key, query)?;
        self.mask = Some(mask);
        Ok(mask)
    }

    /// The bias of attention inside of windows, `[1, heads, places, places]` for all windows; with walls
    /// `[1, windows * heads, places, places]`, the sum of that and of what all heads of a window share.
    pub(super) fn window_bias(&self, node: &Node, bias: &WindowBias) -> Value<'n> {
        let name = |part: &str| format!("{}/{part}", node.path);
        let table = self.constants.get(&bias.weight.key())?;
        let values = quant::to_f32(table.dtype, table.bytes);
        let (places, windows) = (bias.places(), bias.windows());
        let heads = bias.weight.shape().last().copied().unwrap_or(1);
        let pairs = move || (0..places).flat_map(move |query| (0..places).map(move |key| (query, key)));
        let of = |head: usize| pairs().map(move |(query, key)| (head, bias.row(query, key)));
        let shared: Option<Vec<f32>> =
            (0..heads).flat_map(of).map(|(head, row)| values.get(row * heads + head).copied()).collect();
        let constant = |part: &str, values: &[f32], sizes: [usize; 2]| -> Value<'n> {
            let sizes = [sizes[0], sizes[1], places, places].map(|size| size as i64);
            let (dtype, bytes) = (self.network.dtype, self.constants.floats(self.network.dtype, values));
            Ok(self.target.constant(&name(part), crate::lower::data_type(dtype), &sizes, bytes)?)
        };
        let shared = constant("by_head", &shared.ok_or_else(|| Self::short_table(node))?, [1, heads])?;
        if !bias.has_walls() {
            return Ok(shared);
        }
        let wall = |window: usize| pairs().map(move |(query, key)| bias.wall(window, query, key));
        let walls: Vec<f32> = (0..windows).flat_map(wall).collect();
        let walls = constant("by_window", &walls, [windows, 1])?;
        let sum = self.arithmetic(node, &name("bias"), walls, shared, ElementWiseOperation::Sum)?;
        let sizes = [1, (windows * heads) as i64, places as i64, places as i64];
        self.target.reshape(&name("bias4"), sum, &sizes).map_err(Self::refused(node))
    }

    /// A low number where key k >= lengths, else `seen` (0 where there is none): `[batch, 1 or heads, 1 or queries, keys]`.
    /// One for all layers.
    pub(super) fn length_mask(&mut self, node: &Node, of: NodeId, seen: Option<trt::Tensor<'n>>) -> Value<'n> {
        if let Some((found, biased, mask)) = self.length_mask
            && (found, biased) == (of, seen.is_some())
        {
            return Ok(mask);
        }
        let (lengths, seen_bias) = (self.value(of), seen.is_some());
        let prefix = format!("lengths/{}", self.values.len());
        let name = |part: &str| format!("{prefix}/{part}");
        let index = self.token_index(node, 1, &prefix, &[1, 1, 1, -1])?;
        let one = self.integers(&name("one"), &[1], &[1, 1, 1, 1])?;
        let lengths = self.target.reshape(&name("lengths4"), lengths, &[-1, 1, 1, 1]).map_err(Self::refused(node))?;
        let last = self.arithmetic(node, &name("last"), lengths, one, ElementWiseOperation::Sub)?;
        let hidden = self.arithmetic(node, &name("hidden"), index, last, ElementWiseOperation::Greater)?;
        let seen = match seen {
            Some(seen) => seen,
            None => self.number(&name("zero"), 0.0, self.network.dtype, 4)?,
        };
        let mask = self.hide(node, &name("mask"), hidden, seen)?;
        self.length_mask = Some((of, seen_bias, mask));
        Ok(mask)
    }

    /// 0, 1, 2 ... as many as an input of the attention has tokens, int32 of the sizes given.
    fn token_index(&self, node: &Node, input: usize, prefix: &str, sizes: &[i64]) -> Value<'n> {
        let name = |part: &str| format!("{prefix}/{part}");
        let shape =
            self.target.shape_of(&name("shape"), self.value(node.inputs[input])).map_err(Self::refused(node))?;
        let tokens = self.target.slice(&name("tokens"), shape, 0, 1, 1).map_err(Self::refused(node))?;
        let start = self.integers(&name("start"), &[0], &[])?;
        let step = self.integers(&name("step"), &[1], &[1])?;
        let index = self.target.range(&name("index"), tokens, start, step).map_err(Self::refused(node))?;
        self.target.reshape(&name("index4"), index, sizes).map_err(Self::refused(node))
    }

    /// The bias of each key for each query by their places, `[1 or batch, 1, 1, keys]` and `[1 or batch, 1, queries, 1]`,
    /// from a table over all distances that the engine's sizes allow.
    fn bias(
        &self,
        node: &Node,
        attention: &Attention,
        bias: &RelativeBias,
        prefix: &str,
        key: trt::Tensor<'n>,
        query: trt::Tensor<'n>,
    ) -> Value<'n> {
        let name = |part: &str| format!("{prefix}/{part}");
        let reach = self.sizes.max_seq_len.max(self.sizes.max_input_len) as i64;
        let table = self.constants.get(&bias.weight.key())?;
        let values = quant::to_f32(table.dtype, table.bytes);
        let heads = attention.heads;
        let spread = by_distance(bias, &values, heads, 1 - reach..reach).ok_or_else(|| Self::short_table(node))?;
        let dtype = self.network.dtype;
        let bytes = self.constants.floats(dtype, &spread);
        let sizes = [heads as i64, 2 * reach - 1];
        let table = self.target.constant(&name("by_distance"), crate::lower::data_type(dtype), &sizes, bytes)?;
        let offset = self.integers(&name("offset"), &[reach as i32 - 1], &[1, 1, 1])?;
        let zero = self.integers(&name("nearest"), &[0], &[1, 1, 1])?;
        let furthest = self.integers(&name("furthest"), &[2 * reach as i32 - 2], &[1, 1, 1])?;
        let key = self.target.reshape(&name("key3"), key, &[0, 1, -1]).map_err(Self::refused(node))?;
        let query = self.target.reshape(&name("query3"), query, &[0, -1, 1]).map_err(Self::refused(node))?;
        let distance = self.arithmetic(node, &name("distance"), key, query, ElementWiseOperation::Sub)?;
        let place = self.arithmetic(node, &name("place"), distance, offset, ElementWiseOperation::Sum)?;
        // Rows of a prompt's padding lie past the end; nobody reads them.
        let place = self.arithmetic(node, &name("place_from_0"), place, zero, ElementWiseOperation::Max)?;
        let place = self.arithmetic(node, &name("place_in_table"), place, furthest, ElementWiseOperation::Min)?;
        let found = self.target.gather(&name("by_head"), table, place, 1).map_err(Self::refused(node))?;
        self.target.transpose(&name("bias"), found, &[1, 0, 2, 3]).map_err(Self::refused(node))
    }

    pub(super) fn short_table(node: &Node) -> LowerError {
        LowerError::Unsupported { path: node.path.clone(), reason: "its bias table is too short".into() }
    }

    fn hide(&self, node: &Node, name: &str, hidden: trt::Tensor<'n>, seen: trt::Tensor<'n>) -> Value<'n> {
        let dtype = self.network.dtype;
        // Half of the lowest number: a score may be added to it and it stays finite, so that no row becomes NaN.
        let lowest = match dtype {
            DType::Float16 => -32752.0,
            _ => -1.6e38,
        };
        let lowest = self.number(&format!("{name}/lowest"), lowest, dtype, 4)?;
        self.target.select(name, hidden, lowest, seen).map_err(Self::refused(node))
    }

    fn arithmetic(
        &self,
        node: &Node,
        name: &str,
        a: trt::Tensor<'n>,
        b: trt::Tensor<'n>,
        operation: ElementWiseOperation,
    ) -> Value<'n> {
        self.target.elementwise(name, a, b, operation).map_err(Self::refused(node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphs::Weight;

    /// What the plugin reads for a key `away` rows before the query's own, against T5's rule written down anew.
    #[test]
    fn the_plugin_finds_a_bias_by_head_and_rows_between() {
        let (heads, rows) = (3, 300);
        let weight = Weight::tensor("bias".to_owned(), &[32, heads]);
        let bias = RelativeBias { weight, buckets: 32, max_distance: 128, bidirectional: false };
        let values: Vec<f32> = (0..32 * heads).map(|place| place as f32).collect();
        let table = by_distance(&bias, &values, heads, (0..rows as i64).map(|away| -away)).unwrap();
        assert_eq!(table.len(), heads * rows);
        for (head, away) in (0..heads).flat_map(|head| (0..rows).map(move |away| (head, away))) {
            let steps = (away.max(1) as f64 / 16.0).ln() / 8f64.ln() * 16.0 + 1e-6;
            let bucket = if away < 16 { away } else { (16 + steps as usize).min(31) };
            assert_eq!(table[head * rows + away], values[bucket * heads + head], "head {head}, {away} rows");
        }
        assert_eq!(by_distance(&bias, &values[1..], heads, (0..rows as i64).map(|away| -away)), None);
    }
}

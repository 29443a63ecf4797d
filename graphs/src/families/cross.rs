//! What encoder-decoder models have in common: what the decoder reads of a text or a picture besides its own tokens.
use super::decoder::lengths;
use crate::{AttentionLayer, Axis, DType, Dim, Graph, GraphError, Network, Tensor, Type};

/// `cross`: `encoder_output` `[batch, size, hidden]` to the keys and values that every decoder layer reads of it,
/// `cross_key_N` and `cross_value_N` `[batch, size, heads * dim]`. `project` gives both of one layer.
pub(super) fn network(
    dtype: DType,
    [size, hidden]: [Dim; 2],
    layers: usize,
    project: impl for<'g> Fn(&'g Graph, usize, Tensor<'g>) -> [Tensor<'g>; 2],
) -> Result<Network, GraphError> {
    let graph = Graph::new("cross", dtype);
    let x = graph.input("encoder_output", Type::new(dtype, [Axis::Batch.into(), size, hidden]));
    for layer in 0..layers {
        let [key, value] = project(&graph, layer, x);
        graph.output(&format!("cross_key_{layer}"), key);
        graph.output(&format!("cross_value_{layer}"), value);
    }
    graph.finish()
}

/// What `cross` gave, in the decoder: so many keys and values, of which the first lengths count.
#[derive(Clone, Copy)]
pub(super) struct Source<'g> {
    graph: &'g Graph,
    shape: [Dim; 3],
    lengths: Option<Tensor<'g>>,
}

impl<'g> Source<'g> {
    /// Of `size` keys and values, each `width` wide; the input `source_lengths` int32 `[batch]` where sizes differ.
    pub(super) fn new(graph: &'g Graph, size: Dim, width: usize) -> Source<'g> {
        let lengths = size.fixed().is_none().then(|| lengths(graph, "source_lengths"));
        Source { graph, shape: [Axis::Batch.into(), size, width.into()], lengths }
    }

    /// Keys and values for decoder layer `layer`.
    pub(super) fn read(self, layer: usize) -> [Tensor<'g>; 2] {
        let ty = Type::new(self.graph.dtype(), self.shape);
        ["key", "value"].map(|kind| self.graph.input(&format!("cross_{kind}_{layer}"), ty.clone()))
    }

    /// An attention that sees only those which count.
    pub(super) fn within(self, attention: AttentionLayer<'g>) -> AttentionLayer<'g> {
        self.lengths.into_iter().fold(attention, |attention, lengths| attention.key_lengths(lengths))
    }
}

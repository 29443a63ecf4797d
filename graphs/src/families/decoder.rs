//! What decoders have in common: the inputs that the runtime feeds, and the embedded prompt.
use crate::{Axis, CacheInputs, DType, Graph, Logits, Scope, Tensor, Type};

/// Inputs of every decoder-only language network and of mBART's decoder, int32: `input_ids`, `position_ids` `[batch, tokens]`; `past_lengths`,
/// `sequence_lengths` `[batch]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'g> {
    graph: &'g Graph,
    ids: Tensor<'g>,
    pub(crate) position_ids: Tensor<'g>,
    pub(crate) cache: CacheInputs<'g>,
}

impl<'g> Inputs<'g> {
    pub(crate) fn new(graph: &'g Graph) -> Inputs<'g> {
        let ids = |name| graph.input(name, Type::new(DType::Int32, [Axis::Batch.into(), Axis::Tokens.into()]));
        let (input_ids, position_ids) = (ids("input_ids"), ids("position_ids"));
        let (past_lengths, sequence_lengths) = (lengths(graph, "past_lengths"), lengths(graph, "sequence_lengths"));
        Inputs { graph, ids: input_ids, position_ids, cache: CacheInputs { past_lengths, sequence_lengths } }
    }

    /// Rows of `NAME.weight` `[vocab, hidden]`; where `pictures`, ids from `vocab` on are rows of the input
    /// `prompt_embedding_table` `[features, hidden]`.
    pub(crate) fn embed(&self, s: &Scope<'g>, name: &str, vocab: usize, hidden: usize, pictures: bool) -> Tensor<'g> {
        let x = s.embed(name, vocab, hidden, self.ids);
        if !pictures {
            return x;
        }
        let table = Type::new(self.graph.dtype(), [Axis::Features.into(), hidden.into()]);
        x.splice(self.ids, self.graph.input("prompt_embedding_table", table), vocab)
    }

    /// The tokens whose logits are wanted: with [`Logits::Last`] by the input `last_token_ids` int32 `[batch]`.
    pub(crate) fn wanted(&self, x: Tensor<'g>, logits: Logits) -> Tensor<'g> {
        match logits {
            Logits::Last => x.last_token(lengths(self.graph, "last_token_ids")),
            Logits::All => x,
        }
    }
}

fn lengths<'g>(graph: &'g Graph, name: &str) -> Tensor<'g> {
    graph.input(name, Type::new(DType::Int32, [Axis::Batch.into()]))
}

//! From vision features to the language model's embeddings: LLaVA-1.5's two layers (Liu et al. 2023, arXiv 2310.03744).
//! Names of `transformers/models/llava/modeling_llava.py`.
use crate::{ActivationKind, Scope, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub struct Projector {
    pub out: usize,
    pub activation: ActivationKind,
    pub bias: bool,
}

impl Projector {
    pub(crate) fn write<'g>(&self, s: &Scope<'g>, features: Tensor<'g>) -> Tensor<'g> {
        let wide = s.linear("linear_1", self.out).bias_if(self.bias).column().of(features);
        s.linear("linear_2", self.out).bias_if(self.bias).row().of(wide.activation(self.activation))
    }
}

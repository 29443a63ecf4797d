//! Attention without a cache by plain layers, which TensorRT 10 fuses into one kernel.
use super::Value;
use crate::lower::{LowerError, Lowering};
use graphs::{Attention, Mask, Node};
use tensorrt_sys::{ElementWiseOperation, MatrixOperation};

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn plain_attention(&mut self, node: &Node, attention: &Attention) -> Value<'n> {
        let grouped = attention.heads != attention.kv_heads;
        if attention.mask != Mask::None || attention.rope.is_some() || grouped {
            let reason = "attention without a cache must have no mask, no rotary positions and no grouped heads here";
            return Err(LowerError::Unsupported { path: node.path.clone(), reason: reason.into() });
        }
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let query = self.by_head(node, attention, "query", 0)?;
        let key = self.by_head(node, attention, "key", 1)?;
        let value = self.by_head(node, attention, "value", 2)?;
        // Before the product, so that float16 scores stay small.
        let scale = self.number(&name("scale"), attention.scale, self.network.dtype, 4)?;
        let query = self.target.elementwise(&name("scaled"), query, scale, ElementWiseOperation::Prod);
        let (query, key) = ((query.map_err(refused())?, MatrixOperation::None), (key, MatrixOperation::Transpose));
        let scores = self.target.matrix_multiply(&name("scores"), query, key).map_err(refused())?;
        let scores = match self.plain_mask(node, attention)? {
            Some(mask) => {
                let name = name("masked");
                self.target.elementwise(&name, scores, mask, ElementWiseOperation::Sum).map_err(refused())?
            }
            None => scores,
        };
        let shares = self.target.softmax(&name("shares"), scores, 3).map_err(refused())?;
        let (shares, value) = ((shares, MatrixOperation::None), (value, MatrixOperation::None));
        let mixed = self.target.matrix_multiply(&node.path, shares, value).map_err(refused())?;
        self.by_token(node, attention, mixed)
    }

    /// What is added to the scores.
    fn plain_mask(
        &mut self,
        node: &Node,
        attention: &Attention,
    ) -> Result<Option<tensorrt_sys::Tensor<'n>>, LowerError> {
        let bias = match (&attention.relative_bias, &attention.window_bias) {
            (Some(bias), _) => Some(self.square_bias(node, attention, bias)?),
            (None, Some(bias)) => Some(self.window_bias(node, bias)?),
            (None, None) => None,
        };
        match node.inputs.last().filter(|_| attention.key_lengths) {
            Some(lengths) => Ok(Some(self.length_mask(node, *lengths, bias)?)),
            None => Ok(bias),
        }
    }
}

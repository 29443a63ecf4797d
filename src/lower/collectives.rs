//! What joins the ranks of a divided network.
use super::{LowerError, Lowering};
use graphs::Node;
use tensorrt_sys as trt;

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn all_reduce(&self, node: &Node, ranks: usize) -> Result<trt::Tensor<'n>, LowerError> {
        self.check_collectives(node)?;
        self.target.all_reduce(&node.path, self.value(node.inputs[0]), ranks).map_err(Self::refused(node))
    }

    /// x `[batch, features]` of all ranks along its last axis; the layer joins them along the first.
    pub(super) fn all_gather(&self, node: &Node, ranks: usize) -> Result<trt::Tensor<'n>, LowerError> {
        self.check_collectives(node)?;
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let (x, features) =
            (self.value(node.inputs[0]), self.ty(node.inputs[0]).shape.last().and_then(|dim| dim.fixed()));
        let (2, Some(features)) = (self.rank(node), features) else {
            let reason = "only `[batch, features]` is gathered".into();
            return Err(LowerError::Unsupported { path: node.path.clone(), reason });
        };
        let all = self.target.all_gather(&name("by_rank"), x, ranks).map_err(refused())?;
        let sizes = [ranks as i64, -1, features as i64];
        let all = self.target.reshape_transpose(&name("by_row"), all, &sizes, &[1, 0, 2]).map_err(refused())?;
        self.target.reshape(&node.path, all, &[0, (ranks * features) as i64]).map_err(refused())
    }

    fn check_collectives(&self, node: &Node) -> Result<(), LowerError> {
        match self.capabilities.native_collectives {
            true => Ok(()),
            false => Err(LowerError::Unsupported {
                path: node.path.clone(),
                reason: "the ranks of a divided network are not joined on this target yet".into(),
            }),
        }
    }
}

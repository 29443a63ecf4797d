//! What joins the ranks of a divided network.
use super::{LowerError, Lowering};
use crate::plugins::{CollectivePlugin, CollectiveShape, Join};
use graphs::Node;
use tensorrt_sys as trt;

impl<'n> Lowering<'_, 'n, '_> {
    pub(super) fn all_reduce(&self, node: &Node, ranks: usize) -> Result<trt::Tensor<'n>, LowerError> {
        let x = self.value(node.inputs[0]);
        if !self.capabilities.native_collectives {
            return self.plugin_collective(node, x, Join::Sum, ranks);
        }
        self.target.all_reduce(&node.path, x, ranks).map_err(Self::refused(node))
    }

    /// x `[batch, features]` of all ranks along its last axis.
    pub(super) fn all_gather(&self, node: &Node, ranks: usize) -> Result<trt::Tensor<'n>, LowerError> {
        let refused = || Self::refused(node);
        let name = |part: &str| format!("{}/{part}", node.path);
        let (x, features) =
            (self.value(node.inputs[0]), self.ty(node.inputs[0]).shape.last().and_then(|dim| dim.fixed()));
        let (2, Some(features)) = (self.rank(node), features) else {
            let reason = "only `[batch, features]` is gathered".into();
            return Err(LowerError::Unsupported { path: node.path.clone(), reason });
        };
        if !self.capabilities.native_collectives {
            // Its output has the shape of its input, of which only the first part counts.
            let wide = self.target.concatenation(&name("wide"), &vec![x; ranks], 1).map_err(refused())?;
            return self.plugin_collective(node, wide, Join::Gather, ranks);
        }
        // The layer joins them along the first axis.
        let all = self.target.all_gather(&name("by_rank"), x, ranks).map_err(refused())?;
        let sizes = [ranks as i64, -1, features as i64];
        let all = self.target.reshape_transpose(&name("by_row"), all, &sizes, &[1, 0, 2]).map_err(refused())?;
        self.target.reshape(&node.path, all, &[0, (ranks * features) as i64]).map_err(refused())
    }

    fn plugin_collective(
        &self,
        node: &Node,
        x: trt::Tensor<'n>,
        join: Join,
        ranks: usize,
    ) -> Result<trt::Tensor<'n>, LowerError> {
        let shape = CollectiveShape { join, dtype: node.ty.dtype, ranks };
        let plugin = CollectivePlugin::new(shape, self.compiler(node)?)?;
        let outputs = self.target.plugin(&node.path, &[x], Box::new(plugin)).map_err(Self::refused(node))?;
        let reason = || "the plugin has other outputs".into();
        let output = outputs.into_iter().next();
        output.ok_or_else(|| LowerError::Unsupported { path: node.path.clone(), reason: reason() })
    }
}

//! Layers that join the ranks of tensor parallelism: TensorRT 11 and TensorRT-RTX have them.
use crate::abi::{Object, call, word};
use crate::network::{Network, Tensor};
use crate::slots::{layer, network_definition};
use crate::{CollectiveOperation, Error, ReduceOperation, Result};

/// The operations that use no root rank want this in its place.
const NO_ROOT: i64 = -1;

impl Network<'_> {
    /// The sum of x over `ranks` ranks, on each of them.
    pub fn all_reduce(&self, name: &str, x: Tensor<'_>, ranks: usize) -> Result<Tensor<'_>> {
        self.collective(name, x, CollectiveOperation::AllReduce, ReduceOperation::Sum, ranks)
    }

    /// x of all ranks, one after the other along the first axis.
    pub fn all_gather(&self, name: &str, x: Tensor<'_>, ranks: usize) -> Result<Tensor<'_>> {
        self.collective(name, x, CollectiveOperation::AllGather, ReduceOperation::None, ranks)
    }

    fn collective(
        &self,
        name: &str,
        x: Tensor<'_>,
        operation: CollectiveOperation,
        reduction: ReduceOperation,
        ranks: usize,
    ) -> Result<Tensor<'_>> {
        let family = self.library().family();
        let operation = self.value(operation.value(family), "CollectiveOperation")?;
        let reduction = self.value(reduction.value(family), "ReduceOperation")?;
        // An empty group is all ranks.
        let (nobody, none) = (std::ptr::null_mut::<i64>(), 0i64);
        let object = call!(family, self.this(), network_definition::ADD_DIST_COLLECTIVE, (x.object => Object,
            operation => i32, reduction => i32, NO_ROOT => i64, nobody => *mut i64, none => i64) -> Object)?;
        let taken = match object.is_null() {
            true => true,
            false => call!(family, word(object, 1), layer::SET_NB_RANKS, (ranks as i32 => i32) -> bool)?,
        };
        if !taken {
            return Err(Error::argument(name, format!("{ranks} ranks")));
        }
        self.finish(name, object)
    }
}

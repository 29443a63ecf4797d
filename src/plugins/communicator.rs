//! What joins one rank's engines with those of the other ranks, and how the layers of an engine find it.
use super::kernel::Kernels;
use super::local::{self, Local};
use super::nccl::{Nccl, UniqueId};
use crate::device::{Device, DeviceError};
use graphs::DType;
use graphs::interpret::{Collective, Member};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tensorrt_sys::PluginCall;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum CommunicatorError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the GPUs {0} and {1} cannot reach each other's memory")]
    NoPeer(usize, usize),
    #[error("{ranks} ranks in one process; at most {LIMIT} are joined without NCCL", LIMIT = local::LIMIT)]
    TooMany { ranks: usize },
    #[error("NCCL was not found: {reason}")]
    NoNccl { reason: String },
    #[error("NCCL cannot {action}: {reason}")]
    Nccl { action: &'static str, reason: String },
}

impl CommunicatorError {
    pub fn hint(&self) -> Option<String> {
        match self {
            CommunicatorError::Device(error) => error.hint(),
            CommunicatorError::NoPeer(..) => Some("use --join nccl".into()),
            CommunicatorError::TooMany { .. } => Some("use --join nccl, with a GPU for each rank".into()),
            CommunicatorError::NoNccl { .. } => {
                Some("put the folder of libnccl.so.2 into LD_LIBRARY_PATH; PyTorch's wheels bring one".into())
            }
            CommunicatorError::Nccl { .. } => None,
        }
    }
}

/// One rank's way to the others. Every rank must put the same work on its stream, in the same order.
pub struct Communicator {
    pub(super) way: Way,
    /// The other ranks of this process.
    member: Option<Member>,
    /// Why nothing goes on, where somebody else has found out.
    told: OnceLock<String>,
    pub(super) rank: usize,
    pub(super) ranks: usize,
}

pub(super) enum Way {
    /// Ranks of one process, by a kernel of ours.
    Local(Local),
    Nccl(Nccl),
}

/// What a layer asks for.
#[derive(Clone, Copy)]
pub(super) struct Work<'w> {
    pub(super) kernels: &'w Kernels,
    pub(super) dtype: DType,
    /// Elements of the input and of the output; of a rank's part, where parts are put side by side.
    pub(super) count: usize,
    /// Elements of a row of a rank's part, 0 where parts are added.
    pub(super) width: usize,
}

impl Communicator {
    pub(super) fn new(way: Way, member: Option<Member>, rank: usize, ranks: usize) -> Communicator {
        Communicator { way, member, told: OnceLock::new(), rank, ranks }
    }

    /// Ranks as threads of this process, joined by a kernel of ours: one for each device, several of which may be one GPU.
    /// `members` is how their threads meet.
    ///
    /// # Errors
    /// GPUs that cannot reach each other's memory; more ranks than the kernel takes.
    pub fn local(
        devices: &[Device],
        members: Vec<Member>,
        patience: std::time::Duration,
    ) -> Result<Vec<Arc<Communicator>>, CommunicatorError> {
        let ways = Local::all(devices, patience)?;
        let ranks = ways.len();
        let pairs = std::iter::zip(ways, members).enumerate();
        let one = |(rank, (way, member))| Arc::new(Communicator::new(Way::Local(way), Some(member), rank, ranks));
        Ok(pairs.map(one).collect())
    }

    /// A rank with the GPU of `device` to itself, joined by NCCL; returns when all ranks are there. `member` is how its thread
    /// meets those of the same process.
    ///
    /// # Errors
    /// No NCCL here, ranks that it cannot join.
    pub fn nccl(
        device: &Device,
        id: UniqueId,
        rank: usize,
        ranks: usize,
        member: Option<Member>,
    ) -> Result<Arc<Communicator>, CommunicatorError> {
        device.enter()?;
        Ok(Arc::new(Communicator::new(Way::Nccl(Nccl::new(id, rank, ranks)?), member, rank, ranks)))
    }

    /// Waits until every rank of this process is here; ranks of other processes do not count.
    ///
    /// # Errors
    /// A rank that is gone or late, by its number.
    pub fn meet(&self) -> Result<(), String> {
        self.told.get().map_or(Ok(()), |reason| Err(reason.clone()))?;
        self.member.as_ref().map_or(Ok(()), |member| member.all_gather(&[]).map(drop))
    }

    /// Tells the other ranks that this one goes no further, so that they stop waiting for it; no lock is held that work on
    /// the GPU might need.
    pub fn leave(&self) {
        if let Some(member) = &self.member {
            member.leave();
        }
        match &self.way {
            Way::Local(local) => local.stop(self.rank),
            Way::Nccl(nccl) => nccl.abort(),
        }
    }

    /// Ends all waiting for other ranks, for a reason that this rank's calls then give.
    pub fn stop(&self, reason: &str) {
        let _ = self.told.set(reason.to_owned());
        self.leave();
    }

    /// What went wrong in work on the GPU that is over.
    ///
    /// # Errors
    /// A rank that is gone or late, by its number.
    pub fn check(&self) -> Result<(), String> {
        self.told.get().map_or(Ok(()), |reason| Err(reason.clone()))?;
        match &self.way {
            Way::Local(local) => local.check(self.rank),
            Way::Nccl(nccl) => nccl.check(),
        }
    }

    pub(super) fn join(&self, work: &Work<'_>, call: &PluginCall<'_>) -> Result<(), String> {
        match &self.way {
            Way::Local(local) => local.join(self, work, call),
            Way::Nccl(nccl) => nccl.join(self.ranks, work, call),
        }
    }

    /// Loads engines, whose layers take this communicator, or none: TensorRT makes them from the engine's bytes alone, so
    /// that it lies where they find it. Other ranks wait for their turn.
    pub fn while_loading<T>(communicator: Option<&Arc<Communicator>>, load: impl FnOnce() -> T) -> T {
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        *current() = communicator.cloned();
        let loaded = load();
        *current() = None;
        loaded
    }

    pub(super) fn of_the_engine_being_loaded() -> Option<Arc<Communicator>> {
        current().clone()
    }
}

fn current() -> MutexGuard<'static, Option<Arc<Communicator>>> {
    static CURRENT: Mutex<Option<Arc<Communicator>>> = Mutex::new(None);
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

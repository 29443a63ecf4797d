//! One rank of a divided model in a process of its own, joined with the others by TCP and, on GPUs, by NCCL.
use super::{Executor, Reference, RuntimeError, Tensorrt, Wire};
use crate::device::Device;
use crate::engine_dir::EngineDirectory;
use crate::launch::World;
use crate::plugins::{Communicator, UniqueId};
use graphs::interpret::Collective;
use sha2::{Digest, Sha256};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long a rank may be silent, and at least how long ranks are waited for at the start.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long work on the GPU may take to end once NCCL was told to give up.
const GRACE: Duration = Duration::from_secs(5);

/// This process among the others. Dropped without [`Process::finish`] it tells them that it goes no further.
pub struct Process {
    wire: Arc<Wire>,
    world: World,
}

impl Process {
    /// Waits for all ranks.
    ///
    /// # Errors
    /// Ranks that do not come, or that run another directory.
    pub fn join(
        world: &World,
        directory: &EngineDirectory,
        patience: Option<Duration>,
    ) -> Result<Process, RuntimeError> {
        let manifest = serde_json::to_vec(&directory.manifest).unwrap_or_default();
        let wire = Wire::join(world, &Sha256::digest(&manifest), patience.unwrap_or(PATIENCE), PATIENCE)?;
        Ok(Process { wire: Arc::new(wire), world: world.clone() })
    }

    /// This rank's engines on a GPU, or its networks on the reference.
    ///
    /// # Errors
    /// As [`Tensorrt::open`] and [`Reference::open`]; no NCCL.
    pub fn executor(
        &self,
        directory: &EngineDirectory,
        tensorrt: bool,
        devices: &[usize],
    ) -> Result<Box<dyn Executor>, RuntimeError> {
        let World { rank, size, local_rank, .. } = self.world;
        if !tensorrt {
            let collective: Arc<dyn Collective> = self.wire.clone();
            return Ok(Box::new(Reference::open_rank(directory, rank)?.with_collective(&collective)));
        }
        let found = Device::count()?;
        // A launcher may show each process its own GPU only.
        let place = devices.get(rank).copied().unwrap_or(if found > local_rank { local_rank } else { 0 });
        let device = Device::open_at(place)?;
        let id = if rank == 0 { UniqueId::new()?.0.to_vec() } else { Vec::new() };
        let id = self.wire.broadcast(id)?;
        let id = <[u8; 128]>::try_from(id).map_err(|_| RuntimeError::Ranks("rank 0 sent no id".into()))?;
        let joined: Arc<OnceLock<Arc<Communicator>>> = Arc::default();
        let told = Arc::clone(&joined);
        self.wire.watch(move |reason| {
            // Work on the GPU waits for the other rank; once that ends, this process reports by itself.
            if let Some(communicator) = told.get() {
                communicator.stop(reason);
            }
            std::thread::sleep(GRACE);
            eprintln!("error: rank {rank} cannot go on: {reason}");
            std::process::exit(1);
        });
        let communicator = Communicator::nccl(&device, UniqueId(id), rank, size, None)?;
        let communicator = Arc::clone(joined.get_or_init(|| communicator));
        Ok(Box::new(Tensorrt::open_rank(directory, rank, device, Some(communicator))?))
    }

    /// Why nothing goes on, where it is another rank's doing.
    pub fn fault(&self) -> Option<String> {
        self.wire.fault()
    }

    /// Tells the others that this rank has done all it had to.
    pub fn finish(self) {
        self.wire.finish();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.wire.leave();
    }
}

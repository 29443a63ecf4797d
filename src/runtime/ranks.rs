//! A divided model on the reference: every rank in a thread of its own, joined where their networks say so.
use super::{Executor, Output, Reference, RuntimeError};
use crate::engine_dir::EngineDirectory;
use graphs::interpret::{Collective, Group};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How long a rank waits for the others; a step of the largest models takes minutes on a CPU.
const PATIENCE: Duration = Duration::from_secs(600);

pub struct Ranks(Vec<Reference>);

impl Ranks {
    /// Loads every rank of a directory.
    ///
    /// # Errors
    /// As [`Reference::open`].
    pub fn open(directory: &EngineDirectory) -> Result<Ranks, RuntimeError> {
        let members = Group::members(directory.manifest.tp, PATIENCE).into_iter().enumerate();
        let load = |(rank, member)| {
            let collective: Arc<dyn Collective> = Arc::new(member);
            Ok(Reference::open_rank(directory, rank)?.with_collective(&collective))
        };
        Ok(Ranks(members.map(load).collect::<Result<_, RuntimeError>>()?))
    }

    /// Does the same on all ranks at once; gives what the first one gave.
    fn all<T: Send>(
        &mut self,
        work: impl Fn(&mut Reference) -> Result<T, RuntimeError> + Sync,
    ) -> Result<T, RuntimeError> {
        let found: Vec<Result<T, RuntimeError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self.0.iter_mut().map(|rank| scope.spawn(|| work(rank))).collect();
            let stopped = |_| Err(RuntimeError::Inconsistent { what: "rank, which stopped,".into() });
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(stopped)).collect()
        });
        let mut found = found.into_iter().collect::<Result<Vec<T>, _>>()?.into_iter();
        found.next().ok_or_else(|| RuntimeError::Inconsistent { what: "number of ranks".into() })
    }
}

impl Executor for Ranks {
    fn see(&mut self, pixels: &[f32], count: usize) -> Result<(), RuntimeError> {
        self.all(|rank| rank.see(pixels, count))
    }

    fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError> {
        self.all(|rank| rank.prefill(prompts))
    }

    fn decode(&mut self, limit: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        self.all(|rank| rank.decode(limit))
    }

    fn force(&mut self, tokens: &[u32]) -> Result<(), RuntimeError> {
        self.all(|rank| rank.force(tokens))
    }

    fn outputs(&mut self) -> Result<BTreeMap<String, Output>, RuntimeError> {
        self.all(|rank| rank.outputs())
    }
}

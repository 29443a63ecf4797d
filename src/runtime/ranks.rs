//! A divided model in one process: every rank in a thread of its own, joined where their networks say so.
use super::{Executor, Output, Reference, RuntimeError, Tensorrt};
use crate::device::Device;
use crate::engine_dir::EngineDirectory;
use crate::plugins::{Communicator, UniqueId};
use graphs::interpret::{Collective, Group};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a rank waits for the others: on a CPU a step of the largest models takes minutes.
const ON_CPU: Duration = Duration::from_secs(600);
const ON_GPU: Duration = Duration::from_secs(60);

/// How long the others have to end once a rank has failed, of which they are told.
const GRACE: Duration = Duration::from_secs(10);

/// How ranks on GPUs are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// By a kernel of trtvlm's, through memory that they share: also several on one GPU
    Local,
    /// By NVIDIA's NCCL, with a GPU for each
    Nccl,
}

/// Where ranks run.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// The GPU of each rank; nothing: one each, or all on the only one.
    pub devices: Vec<usize>,
    /// Nothing: without NCCL.
    pub way: Option<Way>,
    /// How long a rank waits for the others.
    pub patience: Option<Duration>,
}

type Job<E> = Box<dyn FnOnce(&mut E) + Send>;

/// What makes one rank's executor in its thread, and what tells the other ranks that it goes no further.
struct Seat<E> {
    open: Box<dyn FnOnce() -> Result<E, RuntimeError> + Send>,
    leave: Box<dyn Fn() + Send + Sync>,
}

struct Worker<E> {
    jobs: Option<Sender<Job<E>>>,
    thread: Option<JoinHandle<()>>,
}

/// What all threads know.
struct Fate {
    /// The rank that failed first; the others fail because of it.
    failed: OnceLock<usize>,
    leave: Vec<Box<dyn Fn() + Send + Sync>>,
}

impl Fate {
    fn fail(&self, rank: usize) {
        let _ = self.failed.set(rank);
        // That of the rank itself comes first and is what the others are told; theirs end what waits on their GPUs.
        let (others, own) = (self.leave.iter().enumerate().filter(|(other, _)| *other != rank), self.leave.get(rank));
        own.into_iter().chain(others.map(|(_, leave)| leave)).for_each(|leave| leave());
    }
}

/// Executors of all ranks, each made and used in its own thread.
pub struct Ranks<E> {
    workers: Vec<Worker<E>>,
    fate: Arc<Fate>,
}

impl Ranks<Reference> {
    /// Loads every rank of a directory; `rounded` as [`Reference::rounded`].
    ///
    /// # Errors
    /// As [`Reference::open`].
    pub fn reference(
        directory: &EngineDirectory,
        rounded: bool,
        placement: &Placement,
    ) -> Result<Ranks<Reference>, RuntimeError> {
        let patience = placement.patience.unwrap_or(ON_CPU);
        let members = Group::members(directory.manifest.tp, patience).into_iter().enumerate();
        let seat = |(rank, member)| {
            let collective: Arc<dyn Collective> = Arc::new(member);
            let (leaving, directory) = (Arc::clone(&collective), directory.clone());
            let open = move || {
                let reference = Reference::open_rank(&directory, rank)?.with_collective(&collective);
                Ok(if rounded { reference.rounded() } else { reference })
            };
            Seat { open: Box::new(open), leave: Box::new(move || leaving.leave()) }
        };
        Ranks::start(members.map(seat).collect())
    }
}

impl Ranks<Tensorrt> {
    /// Loads the engines of every rank.
    ///
    /// # Errors
    /// As [`Tensorrt::open`]; GPUs that cannot be joined.
    pub fn tensorrt(directory: &EngineDirectory, placement: &Placement) -> Result<Ranks<Tensorrt>, RuntimeError> {
        let ranks = directory.manifest.tp;
        if ranks > 1 {
            Device::queue_apart();
        }
        let devices = devices(ranks, placement, Device::count()?)?;
        let devices = devices.into_iter().map(Device::open_at).collect::<Result<Vec<_>, _>>()?;
        let patience = placement.patience.unwrap_or(ON_GPU);
        if ranks == 1 {
            let seats = devices.into_iter().map(|device| seat(directory, 0, device, None));
            return Ranks::start(seats.collect());
        }
        let members = Group::members(ranks, patience);
        if placement.way == Some(Way::Nccl) {
            let id = UniqueId::new()?;
            let members = members.into_iter().map(Some);
            let communicators = std::thread::scope(|scope| {
                let join = |(rank, (device, member)): (usize, (&Device, _))| {
                    let device = device.clone();
                    scope.spawn(move || Communicator::nccl(&device, id, rank, ranks, member))
                };
                let threads: Vec<_> = std::iter::zip(&devices, members).enumerate().map(join).collect();
                threads
                    .into_iter()
                    .enumerate()
                    .map(|(rank, thread)| match thread.join() {
                        Ok(joined) => Ok(joined?),
                        Err(_) => Err(RuntimeError::RankStopped { rank }),
                    })
                    .collect::<Result<Vec<_>, _>>()
            })?;
            return Ranks::start(seats(directory, devices, communicators));
        }
        let communicators = Communicator::local(&devices, members, patience)?;
        Ranks::start(seats(directory, devices, communicators))
    }
}

fn seats(
    directory: &EngineDirectory,
    devices: Vec<Device>,
    communicators: Vec<Arc<Communicator>>,
) -> Vec<Seat<Tensorrt>> {
    let pairs = std::iter::zip(devices, communicators).enumerate();
    pairs.map(|(rank, (device, communicator))| seat(directory, rank, device, Some(communicator))).collect()
}

fn seat(
    directory: &EngineDirectory,
    rank: usize,
    device: Device,
    communicator: Option<Arc<Communicator>>,
) -> Seat<Tensorrt> {
    let (leaving, directory) = (communicator.clone(), directory.clone());
    let open = move || Tensorrt::open_rank(&directory, rank, device, communicator);
    Seat { open: Box::new(open), leave: Box::new(move || leaving.iter().for_each(|communicator| communicator.leave())) }
}

/// The GPU of each rank, of `found` that there are.
fn devices(ranks: usize, placement: &Placement, found: usize) -> Result<Vec<usize>, RuntimeError> {
    let chosen = match &placement.devices[..] {
        [] if found >= ranks => (0..ranks).collect(),
        [] if found == 1 && placement.way != Some(Way::Nccl) => vec![0; ranks],
        [] => return Err(RuntimeError::Devices { ranks, found }),
        devices => devices.to_vec(),
    };
    match chosen.len() == ranks {
        true => Ok(chosen),
        false => Err(RuntimeError::Devices { ranks, found: chosen.len() }),
    }
}

/// A panic in a rank's thread is an error of that rank.
fn caught<T>(rank: usize, work: impl FnOnce() -> Result<T, RuntimeError>) -> Result<T, RuntimeError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(RuntimeError::RankStopped { rank }))
}

impl<E: 'static> Ranks<E> {
    fn start(seats: Vec<Seat<E>>) -> Result<Ranks<E>, RuntimeError> {
        let (opens, leave): (Vec<_>, Vec<_>) = seats.into_iter().map(|seat| (seat.open, seat.leave)).unzip();
        let fate = Arc::new(Fate { failed: OnceLock::new(), leave });
        let (report, reports) = channel();
        let worker = |(rank, open): (usize, Box<dyn FnOnce() -> Result<E, RuntimeError> + Send>)| {
            let (jobs, queue) = channel::<Job<E>>();
            let (fate, report) = (Arc::clone(&fate), report.clone());
            let work = move || match caught(rank, open) {
                Ok(mut executor) => {
                    let _ = report.send((rank, Ok(())));
                    drop(report);
                    queue.into_iter().for_each(|job| job(&mut executor));
                }
                Err(error) => {
                    fate.fail(rank);
                    let _ = report.send((rank, Err(error)));
                }
            };
            Worker { jobs: Some(jobs), thread: Some(std::thread::spawn(work)) }
        };
        let workers: Vec<Worker<E>> = opens.into_iter().enumerate().map(worker).collect();
        drop(report);
        let ranks = Ranks { workers, fate };
        ranks.collect(&reports)?;
        Ok(ranks)
    }

    /// Does the same on all ranks at once; gives what each of them gave.
    ///
    /// # Errors
    /// What the rank that failed first failed with.
    pub fn all<T: Send + 'static>(
        &self,
        work: impl Fn(&mut E) -> Result<T, RuntimeError> + Send + Sync + 'static,
    ) -> Result<Vec<T>, RuntimeError> {
        let work = Arc::new(work);
        let (answer, answers) = channel();
        for (rank, worker) in self.workers.iter().enumerate() {
            let (work, answer, fate) = (Arc::clone(&work), answer.clone(), Arc::clone(&self.fate));
            let job = move |executor: &mut E| {
                let found = caught(rank, || work(executor));
                if found.is_err() {
                    fate.fail(rank);
                }
                let _ = answer.send((rank, found));
            };
            // A thread that has ended leaves its answer open.
            let _ = worker.jobs.as_ref().map(|jobs| jobs.send(Box::new(job)));
        }
        drop(answer);
        self.collect(&answers)
    }

    /// The same, and what the first rank gave.
    ///
    /// # Errors
    /// As [`Ranks::all`].
    pub fn first<T: Send + 'static>(
        &self,
        work: impl Fn(&mut E) -> Result<T, RuntimeError> + Send + Sync + 'static,
    ) -> Result<T, RuntimeError> {
        let first = self.all(work)?.into_iter().next();
        first.ok_or(RuntimeError::RankStopped { rank: 0 })
    }

    fn collect<T>(&self, answers: &Receiver<(usize, Result<T, RuntimeError>)>) -> Result<Vec<T>, RuntimeError> {
        let mut found: BTreeMap<usize, T> = BTreeMap::new();
        let mut errors: BTreeMap<usize, RuntimeError> = BTreeMap::new();
        let mut end: Option<Instant> = None;
        while found.len() + errors.len() < self.workers.len() {
            let next = match end {
                None => answers.recv().ok(),
                Some(end) => answers.recv_timeout(end.saturating_duration_since(Instant::now())).ok(),
            };
            match next {
                Some((rank, Ok(answer))) => drop(found.insert(rank, answer)),
                Some((rank, Err(error))) => {
                    errors.insert(rank, error);
                    end.get_or_insert_with(|| Instant::now() + GRACE);
                }
                None => break,
            }
        }
        // What all refuse alike is nothing of one rank.
        let mut texts = errors.values().map(ToString::to_string);
        let same = texts.next().is_some_and(|first| texts.all(|text| text == first));
        if same && errors.len() == self.workers.len() {
            return Err(errors.into_values().next().unwrap_or(RuntimeError::RankStopped { rank: 0 }));
        }
        let cause = self.fate.failed.get().copied().filter(|rank| errors.contains_key(rank));
        if let Some(rank) = cause.or_else(|| errors.keys().next().copied()) {
            let source = errors.remove(&rank).unwrap_or(RuntimeError::RankStopped { rank });
            return Err(RuntimeError::Rank { rank, source: Box::new(source) });
        }
        match (0..self.workers.len()).find(|rank| !found.contains_key(rank)) {
            Some(rank) => Err(RuntimeError::RankStopped { rank }),
            None => Ok(found.into_values().collect()),
        }
    }
}

impl<E> Drop for Ranks<E> {
    fn drop(&mut self) {
        let failed = self.fate.failed.get().is_some();
        self.workers.iter_mut().for_each(|worker| worker.jobs = None);
        let end = Instant::now() + GRACE;
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            // One that hangs is left to the end of the process.
            while failed && !thread.is_finished() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            if !failed || thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

impl<E: Executor + 'static> Executor for Ranks<E> {
    fn see(&mut self, pixels: &[f32], count: usize) -> Result<(), RuntimeError> {
        let pixels: Arc<[f32]> = pixels.into();
        self.first(move |rank| rank.see(&pixels, count))
    }

    fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError> {
        let prompts = prompts.to_vec();
        self.first(move |rank| rank.prefill(&prompts))
    }

    fn decode(&mut self, limit: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
        self.first(move |rank| rank.decode(limit))
    }

    fn force(&mut self, tokens: &[u32]) -> Result<(), RuntimeError> {
        let tokens = tokens.to_vec();
        self.first(move |rank| rank.force(&tokens))
    }

    fn outputs(&mut self) -> Result<BTreeMap<String, Output>, RuntimeError> {
        self.first(Executor::outputs)
    }
}

#[cfg(test)]
mod tests;

//! Ranks as processes: each is connected with rank 0 by TCP. It is how the reference adds up its parts, how the id for NCCL
//! travels, and how a rank learns that another has died (its connection ends) or hangs (it falls silent).
//!
//! A message is its kind (one byte), the number of its bytes (eight, little endian) and those. Every process says `ALIVE` all
//! the time, from a thread that does nothing else, so that slow work is no silence.
mod rendezvous;

use super::RuntimeError;
use crate::launch::World;
use graphs::interpret::Collective;
use rendezvous::{ALIVE, DATA, DONE, GONE, call, gather, prepare, receive, send};
use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a rank that is alive may take, in patiences: a step of the largest models takes minutes on a CPU.
const SLOWNESS: u32 = 10;

/// How long rank 0 waits for the others to hear why it ends.
const FAREWELL: Duration = Duration::from_secs(2);

type Watcher = Box<dyn Fn(&str) + Send + Sync>;

/// One process's connections: all others at rank 0, elsewhere rank 0 alone.
pub struct Wire {
    shared: Arc<Shared>,
}

struct Shared {
    rank: usize,
    size: usize,
    patience: Duration,
    peers: Vec<Peer>,
    state: Mutex<State>,
    changed: Condvar,
    /// Called once when a rank is gone.
    watcher: OnceLock<Watcher>,
}

struct Peer {
    rank: usize,
    /// For writing; a thread of its own reads.
    stream: Mutex<TcpStream>,
    /// The same, to end it while somebody writes.
    switch: TcpStream,
}

#[derive(Default)]
struct State {
    /// Data that came, by the place of the peer.
    inbox: Vec<Vec<Vec<u8>>>,
    /// Peers that are done.
    done: Vec<bool>,
    /// Peers that still can say something.
    reading: usize,
    /// Why nothing goes on.
    gone: Option<String>,
    /// This process has finished or left, and is told nothing any more.
    over: bool,
}

fn ranks(reason: impl Into<String>) -> RuntimeError {
    RuntimeError::Ranks(reason.into())
}

impl Wire {
    /// Joins the other processes. `same` must be equal in all of them, such as a digest of what they run. A rank may be silent
    /// for `patience`, and is waited for at the start as long or for `start`.
    ///
    /// # Errors
    /// Ranks that do not come in time, by their numbers; one that runs something else.
    pub fn join(world: &World, same: &[u8], patience: Duration, start: Duration) -> Result<Wire, RuntimeError> {
        let limit = patience.max(start);
        let peers = if world.rank == 0 { gather(world, same, limit)? } else { vec![call(world, same, limit)?] };
        for (rank, stream) in &peers {
            let ready = prepare(stream, patience);
            ready.map_err(|error| ranks(format!("rank {rank} has stopped: {error}")))?;
        }
        Wire::start(world, peers, patience)
    }

    fn start(world: &World, peers: Vec<(usize, TcpStream)>, patience: Duration) -> Result<Wire, RuntimeError> {
        let failed = |error: std::io::Error| ranks(format!("the connection cannot be used: {error}"));
        let mut readers = Vec::new();
        let mut writers = Vec::new();
        for (rank, stream) in peers {
            readers.push(stream.try_clone().map_err(failed)?);
            let switch = stream.try_clone().map_err(failed)?;
            writers.push(Peer { rank, stream: Mutex::new(stream), switch });
        }
        let count = readers.len();
        let state =
            State { inbox: vec![Vec::new(); count], done: vec![false; count], reading: count, ..State::default() };
        let shared = Arc::new(Shared {
            rank: world.rank,
            size: world.size,
            patience,
            peers: writers,
            state: Mutex::new(state),
            changed: Condvar::new(),
            watcher: OnceLock::new(),
        });
        for (place, stream) in readers.into_iter().enumerate() {
            let (reading, beating) = (Arc::clone(&shared), Arc::clone(&shared));
            std::thread::spawn(move || {
                reading.read(place, stream);
                reading.lock().reading -= 1;
                reading.changed.notify_all();
            });
            std::thread::spawn(move || beating.beat(place));
        }
        Ok(Wire { shared })
    }

    /// Calls `watcher` once a rank is gone, with the reason, from another thread; at once if one is already.
    pub fn watch(&self, watcher: impl Fn(&str) + Send + Sync + 'static) {
        let gone = {
            let state = self.shared.lock();
            let _ = self.shared.watcher.set(Box::new(watcher));
            state.gone.clone()
        };
        if let (Some(reason), Some(watcher)) = (gone, self.shared.watcher.get()) {
            watcher(&reason);
        }
    }

    /// Why nothing goes on, where it is another rank's doing.
    pub fn fault(&self) -> Option<String> {
        self.shared.lock().gone.clone()
    }

    /// What rank 0 has, on every rank.
    ///
    /// # Errors
    /// A rank that is gone, by its number.
    pub fn broadcast(&self, own: Vec<u8>) -> Result<Vec<u8>, RuntimeError> {
        if self.shared.rank == 0 {
            self.shared.tell_all(&own).map_err(ranks)?;
            return Ok(own);
        }
        self.shared.take(0).map_err(ranks)
    }

    /// Says that this rank has done all it had to.
    pub fn finish(&self) {
        self.shared.end(DONE, &[]);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.leave();
        // If this process ended at once, what it has told the others of a third might be lost on its way.
        let told = |state: &mut State| state.gone.is_some() && state.reading > 0;
        if self.shared.rank == 0 {
            let _ = self.shared.changed.wait_timeout_while(self.shared.lock(), FAREWELL, told);
        }
    }
}

impl Shared {
    /// The state is whole whenever it is unlocked.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says to a peer that this process lives, until it has finished or left.
    fn beat(&self, place: usize) {
        let pause = (self.patience / 5).clamp(Duration::from_millis(20), Duration::from_secs(1));
        let mut state = self.lock();
        while !state.over && state.gone.is_none() {
            drop(state);
            // A peer that takes nothing is found by its silence.
            let _ = send(&mut self.peers[place].lock(), ALIVE, &[]);
            state = self.changed.wait_timeout(self.lock(), pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes what one peer sends.
    fn read(&self, place: usize, mut stream: TcpStream) {
        let rank = self.peers[place].rank;
        loop {
            let gone = match receive(&mut stream) {
                Ok((ALIVE, _)) => continue,
                Ok((DATA, bytes)) => {
                    self.lock().inbox[place].push(bytes);
                    self.changed.notify_all();
                    continue;
                }
                Ok((DONE, _)) => {
                    self.lock().done[place] = true;
                    self.changed.notify_all();
                    return;
                }
                Ok((GONE, reason)) => String::from_utf8_lossy(&reason).into_owned(),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    format!("rank {rank} has said nothing for {:?}", self.patience)
                }
                _ => format!("rank {rank} has stopped"),
            };
            self.fail(place, &gone);
            return;
        }
    }

    /// Nothing goes on, as a peer shows; rank 0 tells the others.
    fn fail(&self, place: usize, reason: &str) {
        let watcher = {
            let mut state = self.lock();
            if state.over || state.gone.is_some() {
                return;
            }
            state.gone = Some(reason.to_owned());
            self.watcher.get()
        };
        self.changed.notify_all();
        // Whoever writes to it waits no longer.
        let _ = self.peers[place].switch.shutdown(Shutdown::Both);
        if self.rank == 0 {
            self.shut(GONE, reason.as_bytes());
        }
        if let Some(watcher) = watcher {
            watcher(reason);
        }
    }

    /// A last message to all, which does not wait for peers that take nothing.
    fn shut(&self, kind: u8, bytes: &[u8]) {
        for peer in &self.peers {
            let mut stream = peer.lock();
            let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
            let _ = send(&mut stream, kind, bytes);
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn end(&self, kind: u8, bytes: &[u8]) {
        let (over, gone) = {
            let mut state = self.lock();
            (std::mem::replace(&mut state.over, true), state.gone.is_some())
        };
        self.changed.notify_all();
        // Whoever noticed that a rank is gone says so, or knows it of rank 0.
        if !over && !gone {
            self.shut(kind, bytes);
        }
    }

    fn tell_all(&self, bytes: &[u8]) -> Result<(), String> {
        self.peers.iter().enumerate().try_for_each(|(place, _)| self.tell(place, bytes))
    }

    fn tell(&self, place: usize, bytes: &[u8]) -> Result<(), String> {
        let peer = &self.peers[place];
        let sent = send(&mut peer.lock(), DATA, bytes);
        sent.map_err(|_| {
            // The thread that reads soon knows why.
            let unknown = |state: &mut State| state.gone.is_none();
            let state = self.changed.wait_timeout_while(self.lock(), Duration::from_secs(1), unknown);
            let reason = state.unwrap_or_else(PoisonError::into_inner).0.gone.clone();
            reason.unwrap_or_else(|| format!("rank {} has stopped", peer.rank))
        })
    }

    /// The next data of a peer.
    fn take(&self, place: usize) -> Result<Vec<u8>, String> {
        let (rank, limit) = (self.peers[place].rank, self.patience * SLOWNESS);
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if !state.inbox[place].is_empty() {
                return Ok(state.inbox[place].remove(0));
            }
            if let Some(reason) = &state.gone {
                return Err(reason.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.done[place] || left.is_zero() {
                let late = || format!("rank {rank} did not come within {limit:?}");
                return Err(if state.done[place] { format!("rank {rank} has ended") } else { late() });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Brings `own` to rank 0, which joins what all have; gives what came of it.
    fn exchange(
        &self,
        own: &[f32],
        join: impl FnOnce(Vec<Vec<f32>>) -> Result<Vec<f32>, String>,
    ) -> Result<Vec<f32>, String> {
        if self.rank != 0 {
            self.tell(0, bytemuck::cast_slice(own))?;
            return floats(&self.take(0)?);
        }
        let mut all = vec![own.to_vec()];
        for place in 0..self.peers.len() {
            all.push(floats(&self.take(place)?)?);
        }
        let joined = join(all)?;
        self.tell_all(bytemuck::cast_slice(&joined))?;
        Ok(joined)
    }
}

impl Peer {
    fn lock(&self) -> MutexGuard<'_, TcpStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn floats(bytes: &[u8]) -> Result<Vec<f32>, String> {
    let (values, rest) = bytes.as_chunks::<4>();
    match rest {
        [] => Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
        _ => Err("a rank sent a part of a number".into()),
    }
}

impl Collective for Wire {
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), String> {
        let count = values.len();
        let differ = |found: usize| format!("the ranks have {count} and {found} values");
        let sum = |all: Vec<Vec<f32>>| {
            if let Some(other) = all.iter().find(|other| other.len() != count) {
                return Err(differ(other.len()));
            }
            Ok((0..count).map(|place| all.iter().map(|rank| rank[place]).sum()).collect())
        };
        let sums = self.shared.exchange(values, sum)?;
        if sums.len() != count {
            return Err(differ(sums.len()));
        }
        values.copy_from_slice(&sums);
        Ok(())
    }

    fn all_gather(&self, values: &[f32]) -> Result<Vec<Vec<f32>>, String> {
        let (count, size) = (values.len(), self.shared.size);
        let all = self.shared.exchange(values, |all| Ok(all.concat()))?;
        if all.len() != count * size {
            return Err(format!("{size} ranks have {} values, this one {count}", all.len()));
        }
        Ok(if count == 0 { vec![Vec::new(); size] } else { all.chunks_exact(count).map(<[f32]>::to_vec).collect() })
    }

    fn leave(&self) {
        self.shared.end(GONE, format!("rank {} has stopped", self.shared.rank).as_bytes());
    }
}

#[cfg(test)]
mod tests;

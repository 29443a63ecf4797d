//! What the ranks of a divided network do together, in one process: a thread each.
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One rank's way to the others.
pub trait Collective: Send + Sync {
    /// Adds what the other ranks have, in the order of the ranks.
    ///
    /// # Errors
    /// A rank that is gone or late, by its number.
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), String>;

    /// What each rank has, by rank.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn all_gather(&self, values: &[f32]) -> Result<Vec<Vec<f32>>, String>;

    /// Tells the others that this rank goes no further; they stop waiting for it.
    fn leave(&self);
}

/// The ranks of one process.
pub struct Group {
    state: Mutex<State>,
    changed: Condvar,
    patience: Duration,
}

struct State {
    /// What each rank brought to the round that is going on.
    brought: Vec<Option<Vec<f32>>>,
    /// Of the last round, until every rank has taken it.
    finished: Option<Arc<Vec<Vec<f32>>>>,
    taken: Vec<bool>,
    gone: Option<usize>,
}

/// One rank; when it is dropped the others stop waiting for it.
pub struct Member {
    group: Arc<Group>,
    rank: usize,
}

impl Group {
    /// Members for `ranks` threads, each of which waits for the others no longer than `patience`.
    pub fn members(ranks: usize, patience: Duration) -> Vec<Member> {
        let state = State { brought: vec![None; ranks], finished: None, taken: vec![true; ranks], gone: None };
        let group = Arc::new(Group { state: Mutex::new(state), changed: Condvar::new(), patience });
        (0..ranks).map(|rank| Member { group: group.clone(), rank }).collect()
    }

    /// The state is whole whenever it is unlocked, also after a panic elsewhere.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, a rank is gone or time is up; then `late` names a rank that is not there.
    fn wait<'g>(
        &self,
        mut state: MutexGuard<'g, State>,
        done: impl Fn(&State) -> bool,
        late: impl Fn(&State) -> Option<usize>,
    ) -> Result<MutexGuard<'g, State>, String> {
        let end = Instant::now() + self.patience;
        while !done(&state) {
            if let Some(rank) = state.gone {
                return Err(format!("rank {rank} has stopped"));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let rank = late(&state).map_or_else(|| "another rank".to_owned(), |rank| format!("rank {rank}"));
                return Err(format!("{rank} did not come within {:?}", self.patience));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state)
    }
}

impl Collective for Member {
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), String> {
        let all = self.all_gather(values)?;
        if let Some(other) = all.iter().find(|other| other.len() != values.len()) {
            return Err(format!("the ranks have {} and {} values", values.len(), other.len()));
        }
        for (place, value) in values.iter_mut().enumerate() {
            *value = all.iter().map(|rank| rank[place]).sum();
        }
        Ok(())
    }

    fn all_gather(&self, values: &[f32]) -> Result<Vec<Vec<f32>>, String> {
        let group = &*self.group;
        // The round before is over when every rank has taken its result.
        let absent = |taken: &[bool]| taken.iter().position(|taken| !taken);
        let mut state = group.wait(
            group.lock(),
            |state| absent(&state.taken).is_none() || state.finished.is_none(),
            |state| absent(&state.taken),
        )?;
        state.brought[self.rank] = Some(values.to_vec());
        if state.brought.iter().all(Option::is_some) {
            let all = state.brought.iter_mut().filter_map(Option::take).collect();
            state.finished = Some(Arc::new(all));
            state.taken.fill(false);
            group.changed.notify_all();
        }
        let missing = |state: &State| state.brought.iter().position(Option::is_none);
        let mine = |state: &State| state.finished.is_some() && !state.taken[self.rank];
        let mut state = group.wait(state, mine, missing)?;
        state.taken[self.rank] = true;
        let all = state.finished.clone().unwrap_or_default();
        if state.taken.iter().all(|taken| *taken) {
            state.finished = None;
            group.changed.notify_all();
        }
        Ok(all.to_vec())
    }

    fn leave(&self) {
        self.group.lock().gone.get_or_insert(self.rank);
        self.group.changed.notify_all();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn sums_and_joins_many_times() {
        let members = Group::members(3, Duration::from_secs(20));
        let ranks: Vec<_> = members
            .into_iter()
            .enumerate()
            .map(|(rank, member)| {
                thread::spawn(move || {
                    for round in 0..200 {
                        let mut values = [rank as f32, round as f32];
                        member.all_reduce(&mut values).unwrap();
                        assert_eq!(values, [3.0, 3.0 * round as f32]);
                        let all = member.all_gather(&[rank as f32 + round as f32]).unwrap();
                        assert_eq!(all, [0, 1, 2].map(|other| vec![(other + round) as f32]));
                    }
                    // Whoever is done first must not make the others fail.
                    member
                })
            })
            .collect();
        let members: Vec<Member> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        assert_eq!(members.len(), 3);
    }

    #[test]
    fn a_rank_that_stops_is_named() {
        let mut members = Group::members(2, Duration::from_secs(20));
        let (last, first) = (members.pop().unwrap(), members.pop().unwrap());
        let waiting = thread::spawn(move || first.all_gather(&[1.0]));
        drop(last);
        assert_eq!(waiting.join().unwrap().unwrap_err(), "rank 1 has stopped");
    }

    #[test]
    fn a_rank_that_is_late_is_named() {
        let members = Group::members(3, Duration::from_millis(30));
        let [first, second, _third] = &members[..] else { panic!("three") };
        thread::scope(|scope| {
            let waiting = scope.spawn(|| first.all_gather(&[1.0]));
            let error = second.all_gather(&[1.0]).unwrap_err();
            assert_eq!(error, "rank 2 did not come within 30ms");
            assert!(waiting.join().unwrap().unwrap_err().contains("did not come"));
        });
    }
}

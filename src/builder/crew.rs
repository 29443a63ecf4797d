//! Children side by side, each attended by a thread of its own. One that fails stops the others.
use super::{BuildEvent, BuildFailure, BuiltEngine, EngineSpec, Supervisor};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;

enum News {
    Progress { phase: String, step: u32, steps: u32 },
    Log(String),
    Ended(Box<Result<BuiltEngine, BuildFailure>>),
}

/// What a child's number is told with.
pub(super) type Listener<'l> = &'l mut dyn FnMut(usize, BuildEvent<'_>);

/// The children of one build, by numbers that their starter gives. Dropping it stops those that still work.
pub struct Crew<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    supervisor: Supervisor<'env>,
    jobs: usize,
    working: usize,
    ended: VecDeque<(usize, Result<BuiltEngine, BuildFailure>)>,
    stop: Arc<AtomicBool>,
    sender: Sender<(usize, News)>,
    news: Receiver<(usize, News)>,
}

impl<'scope, 'env> Crew<'scope, 'env> {
    /// At most `jobs` children at once, at least one.
    pub fn new(scope: &'scope Scope<'scope, 'env>, supervisor: Supervisor<'env>, jobs: usize) -> Crew<'scope, 'env> {
        let ((sender, news), stop) = (channel(), Arc::new(AtomicBool::new(false)));
        let (jobs, ended) = (jobs.max(1), VecDeque::new());
        Crew { scope, supervisor, jobs, working: 0, ended, stop, sender, news }
    }

    /// Whether another child has to wait: enough are at work, or one has ended and nobody has looked how.
    pub fn is_full(&self) -> bool {
        self.working >= self.jobs || !self.ended.is_empty()
    }

    /// Starts a child that builds `spec` in the empty folder `work`.
    pub fn start(&mut self, number: usize, spec: EngineSpec, work: PathBuf) {
        let (supervisor, stop, sender) = (self.supervisor, self.stop.clone(), self.sender.clone());
        self.working += 1;
        // The system kills a child whose parent's thread ends: this one waits for it.
        self.scope.spawn(move || {
            // Whoever listens is there until the thread has ended.
            let say = |news| drop(sender.send((number, news)));
            let interrupted = || stop.load(Ordering::Relaxed) || (supervisor.interrupted)();
            let supervisor = Supervisor { interrupted: &interrupted, ..supervisor };
            let built = supervisor.build(&spec, &work, &mut |event| match event {
                BuildEvent::Progress { phase, step, steps } => {
                    say(News::Progress { phase: phase.to_owned(), step, steps });
                }
                BuildEvent::Log(text) => say(News::Log(text.to_owned())),
            });
            say(News::Ended(Box::new(built)));
        });
    }

    /// Tells what has happened so far, without waiting.
    pub fn listen(&mut self, listener: Listener<'_>) {
        while let Ok((number, news)) = self.news.try_recv() {
            self.hear(number, news, listener);
        }
    }

    /// Waits for a child to end; `None` where none works any more.
    pub fn next(&mut self, listener: Listener<'_>) -> Option<(usize, Result<BuiltEngine, BuildFailure>)> {
        while self.ended.is_empty() && self.working > 0 {
            let Ok((number, news)) = self.news.recv() else { break };
            self.hear(number, news, listener);
        }
        self.ended.pop_front()
    }

    fn hear(&mut self, number: usize, news: News, listener: Listener<'_>) {
        match news {
            News::Progress { phase, step, steps } => {
                listener(number, BuildEvent::Progress { phase: &phase, step, steps });
            }
            News::Log(text) => listener(number, BuildEvent::Log(&text)),
            News::Ended(built) => {
                self.working -= 1;
                self.ended.push_back((number, *built));
            }
        }
    }
}

impl Drop for Crew<'_, '_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Memory;
    use super::super::fake::{DONE, Fake};
    use super::*;
    use std::time::{Duration, Instant};

    /// Builds engines `0..count`; gives them in the order in which they ended, up to the first failure.
    fn build(fake: &Fake, count: usize, jobs: usize, interrupted: bool) -> Vec<Result<usize, String>> {
        let (program, memory) = (fake.program(), Memory::default());
        let supervisor = Supervisor { program: &program, timeout: None, interrupted: &|| interrupted, memory: &memory };
        let mut found = Vec::new();
        std::thread::scope(|scope| {
            let mut crew = Crew::new(scope, supervisor, jobs);
            let mut take = |crew: &mut Crew<'_, '_>| {
                let Some((number, built)) = crew.next(&mut |_, _| ()) else { return false };
                let failed = built.is_err();
                found.push(built.map(|_| number).map_err(|error| error.to_string()));
                !failed
            };
            for number in 0..count {
                while crew.is_full() {
                    if !take(&mut crew) {
                        return;
                    }
                }
                let (spec, work) = fake.engine(&number.to_string());
                crew.start(number, spec, work);
            }
            while take(&mut crew) {}
        });
        found
    }

    /// Each waits for the other, which only ends where both are at work.
    #[test]
    fn as_many_as_asked_for_work_at_once() {
        let wait =
            "name=$(basename $PWD); touch ../$name.here; while [ $(ls ../*.here | wc -l) -lt 2 ]; do sleep 0.02; done";
        let fake = Fake::new(&format!("{wait}; {DONE}"));
        let mut found = build(&fake, 2, 2, false);
        found.sort();
        assert_eq!(found, [Ok(0), Ok(1)]);
        // No more than one, which sees itself alone.
        let fake = Fake::new(&format!("touch here-$$; mkdir ../alone || exit 1; sleep 0.05; rmdir ../alone; {DONE}"));
        assert_eq!(build(&fake, 4, 1, false), [Ok(0), Ok(1), Ok(2), Ok(3)]);
        assert_eq!(std::fs::read(fake.folder().join("3.engine")).unwrap(), b"plan");
    }

    #[test]
    fn a_failure_stops_the_others() {
        let fake = Fake::new("case $PWD in *work-1) exit 3;; *) exec sleep 60;; esac");
        let start = Instant::now();
        let found = build(&fake, 3, 3, false);
        assert_eq!(found, [Err("the builder of the language engine ended with exit code 3 and no result".into())]);
        assert!(start.elapsed() < Duration::from_secs(30), "the others were waited for");
    }

    #[test]
    fn an_interrupt_stops_all() {
        let start = Instant::now();
        assert_eq!(build(&Fake::new("exec sleep 60"), 2, 2, true), [Err("interrupted".into())]);
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}

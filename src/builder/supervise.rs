//! The parent's side: starts a child, follows its messages, keeps its last log lines, and judges how it ended.
use super::memory::Share;
use super::{BuiltEngine, ChildMessage, EngineSpec, MARK, Memory, status_bytes};
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Log lines that an error repeats.
const TAIL: usize = 8;

#[derive(Debug, Error)]
pub enum BuildFailure {
    #[error("cannot start the builder `{program}`")]
    Start { program: PathBuf, source: std::io::Error },
    #[error("cannot write `{path}`")]
    Spec { path: PathBuf, source: std::io::Error },
    /// TensorRT refused the network; `causes` are its own messages.
    #[error("building the {name} engine: {message}")]
    Refused { name: String, message: String, causes: Vec<String>, hint: Option<String> },
    #[error("the builder of the {name} engine {how}{}", tail(.log))]
    Died { name: String, how: String, log: Vec<String> },
    #[error("the builder of the {name} engine did not finish in {seconds} s{}", tail(.log))]
    TimedOut { name: String, seconds: u64, log: Vec<String> },
    #[error("interrupted")]
    Interrupted,
}

fn tail(log: &[String]) -> String {
    if log.is_empty() { String::new() } else { format!("; its last lines:\n  {}", log.join("\n  ")) }
}

impl BuildFailure {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            BuildFailure::Refused { hint, .. } => return hint.clone(),
            BuildFailure::Died { how, .. } if how.contains("signal 9") => {
                "the system may be out of memory: `trtvlm plan` states what a build needs".into()
            }
            BuildFailure::Died { .. } => {
                "this is a fault of TensorRT or of trtvlm: run again with -v for its log".into()
            }
            BuildFailure::TimedOut { .. } => "give more time with --timeout".into(),
            BuildFailure::Start { .. } | BuildFailure::Spec { .. } | BuildFailure::Interrupted => return None,
        })
    }
}

/// What happens while a child works.
pub enum BuildEvent<'e> {
    Progress { phase: &'e str, step: u32, steps: u32 },
    Log(&'e str),
}

enum Line {
    Text(String),
    End,
}

/// How children are started and watched.
#[derive(Clone, Copy)]
pub struct Supervisor<'s> {
    /// This program, or another that understands `build-engine SPEC`.
    pub program: &'s Path,
    pub timeout: Option<Duration>,
    pub interrupted: &'s (dyn Fn() -> bool + Sync),
    /// What children that run side by side have together.
    pub memory: &'s Memory,
}

impl Supervisor<'_> {
    /// Builds one engine in a child process that works in the empty folder `work`.
    ///
    /// Inside the folder everything has a fixed name: the length of a path decides where the child's memory lies, and
    /// that shows in the plan (see `tensorrt_sys::steady`).
    ///
    /// # Errors
    /// How the child failed or died; nothing that it had begun to write is of use then.
    pub fn build(
        &self,
        spec: &EngineSpec,
        work: &Path,
        events: &mut dyn FnMut(BuildEvent<'_>),
    ) -> Result<BuiltEngine, BuildFailure> {
        let fail = |source| BuildFailure::Spec { path: work.into(), source };
        let inner = furnish(spec, work).map_err(fail)?;
        let mut command = Command::new(self.program);
        if spec.local.is_some() {
            // TensorRT 10's builder looks for the library of its kernels, which lies beside it, by its bare name.
            let beside = spec.library.parent().into_iter().map(Path::to_path_buf);
            let others = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
            let all = std::env::join_paths(beside.chain(std::env::split_paths(&others)));
            command.env("LD_LIBRARY_PATH", all.unwrap_or(others));
        } else {
            // Per-thread lists of free blocks make addresses, and with them plans, depend on how threads take turns.
            command.env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");
        }
        let mut child = command
            .arg("build-engine")
            .arg(SPEC)
            .current_dir(work)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| BuildFailure::Start { program: self.program.into(), source })?;
        let lines = follow(&mut child);
        let mut share = self.memory.share();
        let ended = self.attend(&spec.label, child.id(), &lines, &mut share, events);
        if ended.is_err() {
            let _ = child.kill();
        }
        let status = child.wait();
        let Ended { last, log } = ended?;
        let peak_own_bytes = share.most();
        match (last, status) {
            (Some(ChildMessage::Done { bytes, sha256, library, gpu, seconds, peak_resident_bytes }), Ok(status))
                if status.success() =>
            {
                std::fs::rename(work.join(&inner.engine), &spec.engine).map_err(fail)?;
                Ok(BuiltEngine { bytes, sha256, library, gpu, seconds, peak_own_bytes, peak_resident_bytes })
            }
            // Ctrl-C on a terminal goes to the child as well, which may be gone first.
            _ if (self.interrupted)() => Err(BuildFailure::Interrupted),
            (Some(ChildMessage::Failed { message, causes, hint }), _) => {
                Err(BuildFailure::Refused { name: spec.label.clone(), message, causes, hint })
            }
            (_, status) => {
                let how = status.map_or_else(|error| format!("was lost: {error}"), describe);
                Err(BuildFailure::Died { name: spec.label.clone(), how, log: log.into() })
            }
        }
    }

    /// Reads until both streams end; gives the child's last word and the end of its log.
    fn attend(
        &self,
        name: &str,
        process: u32,
        lines: &Receiver<Line>,
        share: &mut Share<'_>,
        events: &mut dyn FnMut(BuildEvent<'_>),
    ) -> Result<Ended, BuildFailure> {
        let start = Instant::now();
        let mut ended = Ended::default();
        let mut open = 2;
        while open > 0 {
            if (self.interrupted)() {
                return Err(BuildFailure::Interrupted);
            }
            if let Some(limit) = self.timeout.filter(|limit| start.elapsed() > *limit) {
                let log = ended.log.into();
                return Err(BuildFailure::TimedOut { name: name.into(), seconds: limit.as_secs(), log });
            }
            share.is_now(status_bytes(&process.to_string(), "RssAnon"));
            match lines.recv_timeout(Duration::from_millis(200)) {
                Ok(Line::Text(text)) => match text.strip_prefix(MARK).map(serde_json::from_str) {
                    Some(Ok(ChildMessage::Progress { phase, step, steps })) => {
                        events(BuildEvent::Progress { phase: &phase, step, steps });
                    }
                    Some(Ok(message)) => ended.last = Some(message),
                    _ => {
                        events(BuildEvent::Log(&text));
                        ended.log.push_back(text);
                        if ended.log.len() > TAIL {
                            ended.log.pop_front();
                        }
                    }
                },
                Ok(Line::End) | Err(RecvTimeoutError::Disconnected) => open -= 1,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Ok(ended)
    }
}

#[derive(Default)]
struct Ended {
    last: Option<ChildMessage>,
    log: VecDeque<String>,
}

const SPEC: &str = "spec.json";

/// Gives every file that the spec names a fixed name in the work folder, and writes the spec there.
fn furnish(spec: &EngineSpec, work: &Path) -> std::io::Result<EngineSpec> {
    let mut inner = spec.clone();
    inner.network = "network.txt".into();
    inner.engine = "engine".into();
    symlink(std::path::absolute(&spec.network)?, work.join(&inner.network))?;
    let mut links: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for place in inner.constants.values_mut() {
        let link = match links.get(&place.file) {
            Some(link) => link.clone(),
            None => {
                let link = PathBuf::from(format!("weights-{}", links.len()));
                symlink(std::path::absolute(&place.file)?, work.join(&link))?;
                links.insert(place.file.clone(), link.clone());
                link
            }
        };
        place.file = link;
    }
    std::fs::write(work.join(SPEC), serde_json::to_vec(&inner).map_err(std::io::Error::other)?)?;
    Ok(inner)
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (_, Some(code)) => format!("ended with exit code {code} and no result"),
        _ => "ended without a result".into(),
    }
}

/// One channel for the lines of both streams.
fn follow(child: &mut Child) -> Receiver<Line> {
    let (sender, receiver) = channel();
    let pump = |stream: Box<dyn Read + Send>, sender: Sender<Line>| {
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(Line::Text(text)).is_err() {
                    return;
                }
                line.clear();
            }
            let _ = sender.send(Line::End);
        });
    };
    if let Some(stream) = child.stdout.take() {
        pump(Box::new(stream), sender.clone());
    }
    if let Some(stream) = child.stderr.take() {
        pump(Box::new(stream), sender);
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::super::fake::{DONE, Fake};
    use super::*;

    /// Runs a shell script in the place of a builder.
    fn run(script: &str, timeout: Option<Duration>) -> Result<BuiltEngine, BuildFailure> {
        let fake = Fake::new(script);
        let (spec, work) = fake.engine("model");
        let (program, memory) = (fake.program(), Memory::default());
        let supervisor = Supervisor { program: &program, timeout, interrupted: &|| false, memory: &memory };
        let built = supervisor.build(&spec, &work, &mut |_| {})?;
        assert_eq!(std::fs::read(&spec.engine).unwrap(), b"plan");
        Ok(built)
    }

    #[test]
    fn takes_the_result() {
        assert_eq!(run(DONE, None).unwrap().bytes, 4);
    }

    #[test]
    fn every_way_to_die_has_a_message() {
        let message = |script: &str, timeout| run(script, timeout).unwrap_err().to_string();
        assert_eq!(
            message("echo one >&2; kill -SEGV $$", None),
            "the builder of the language engine was killed by signal 11; its last lines:\n  one"
        );
        assert_eq!(message("exit 3", None), "the builder of the language engine ended with exit code 3 and no result");
        assert_eq!(
            message(&format!("{DONE}; kill -ABRT $$"), None),
            "the builder of the language engine was killed by signal 6"
        );
        assert_eq!(
            message(r#"echo '@trtvlm {"failed":{"message":"m","causes":[],"hint":null}}'; exit 1"#, None),
            "building the language engine: m"
        );
        assert_eq!(
            message("exec sleep 60", Some(Duration::from_millis(300))),
            "the builder of the language engine did not finish in 0 s"
        );
        let flood = message("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exit 1", None);
        assert!(flood.ends_with("line 19998\n  line 19999"), "{flood}");
    }
}

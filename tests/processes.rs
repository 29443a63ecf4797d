//! A process for each rank, as mpirun, torchrun and SLURM start them, on the reference.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::DType;
use serde_json::{Value, json};
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const LAUNCHERS: [[&str; 3]; 3] = [
    ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
    ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
];

/// One process for each rank; they are killed when a test fails.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(directory: &Path, size: usize, launcher: [&str; 3], arguments: &[&str]) -> Processes {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let one = |rank: usize| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trtvlm"));
        command.args(["run", directory.to_str().unwrap()]).args(arguments);
        command.envs(launcher.iter().zip([rank, size, rank]).map(|(name, value)| (name, value.to_string())));
        command.env("SLURM_STEP_ID", "0").env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", free.port().to_string());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    Processes((0..size).map(one).collect())
}

fn end(mut processes: Processes) -> Vec<Output> {
    let children = std::mem::take(&mut processes.0);
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

#[test]
fn processes_say_what_the_whole_says() {
    let root = tempfile::tempdir().unwrap();
    for (name, tp, launcher) in [("llava-hf", 2, 0), ("blip2-t5", 4, 1), ("llava-hf", 4, 2)] {
        let directory = |tp: usize| {
            let output = root.path().join(format!("{name}-{tp}"));
            build_reference(&fixture(name), &output, &["--tp", &tp.to_string(), "--max-batch-size", "2"]);
            output
        };
        let asks = ["--prompt", "Why?", "What is it?", "--max-new-tokens", "6"];
        let whole: Vec<_> = common::run(&directory(1), &asks).iter().map(ids).collect();
        let done = end(start(&directory(tp), tp, LAUNCHERS[launcher], &[&asks[..], &["--json"]].concat()));
        for (rank, output) in done.iter().enumerate() {
            assert!(output.status.success(), "rank {rank}: {}", String::from_utf8_lossy(&output.stderr));
            // Rank 0 speaks for all.
            assert_eq!(output.stdout.is_empty(), rank != 0);
        }
        let said: Value = serde_json::from_slice(&done[0].stdout).unwrap();
        let found: Vec<_> = said["outputs"].as_array().unwrap().iter().map(ids).collect();
        assert_eq!(found, whole, "{name} {tp}");
    }
}

#[test]
fn another_number_of_processes_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("engines");
    build_reference(&fixture("llava-hf"), &output, &["--tp", "4"]);
    for output in end(start(&output, 2, LAUNCHERS[0], &["--prompt", "a"])) {
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(text.contains("2 processes were started for a directory of 4 ranks"), "{text}");
    }
}

/// A model of four ranks that goes on making tokens for long, and its processes, which are at it.
fn at_work(root: &Path, patience: &str) -> Processes {
    let (checkpoint, directory) = (root.join("checkpoint"), root.join("engines"));
    let config = llama_config(json!({ "max_position_embeddings": 20000, "num_hidden_layers": 4 }));
    write_checkpoint(&checkpoint, &config, &random_tensors(&config), DType::Float32, 1);
    edit_json(&checkpoint.join("generation_config.json"), |config| config["eos_token_id"] = json!(447));
    let sizes = ["--tp", "4", "--max-input-len", "64", "--max-output-len", "19000"];
    build_reference(&checkpoint, &directory, &sizes);
    let arguments = ["--prompt", "Why?", "--max-new-tokens", "19000", "--rank-timeout", patience];
    let mut processes = start(&directory, 4, LAUNCHERS[0], &arguments);
    let mut first = [0; 1];
    processes.0[0].stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    processes
}

fn signal(name: &str, child: &Child) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Ends what is left and looks at what each rank but `missing` said.
fn others_name(mut processes: Processes, missing: usize, wanted: &str, limit: Duration) {
    let start = Instant::now();
    // Who still runs when time is up is killed, and its exit code tells.
    while start.elapsed() < limit {
        let running = |(rank, child): (usize, &mut Child)| rank != missing && child.try_wait().unwrap().is_none();
        if !processes.0.iter_mut().enumerate().any(running) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    processes.0.iter_mut().for_each(|child| drop(child.kill()));
    for (rank, output) in end(processes).into_iter().enumerate().filter(|(rank, _)| *rank != missing) {
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "rank {rank}: {:?} {text}", output.status);
        assert!(text.contains(wanted), "rank {rank}: {text}");
    }
}

#[test]
fn a_rank_that_is_killed_ends_the_others() {
    let root = tempfile::tempdir().unwrap();
    let processes = at_work(root.path(), "60");
    signal("-KILL", &processes.0[2]);
    others_name(processes, 2, "rank 2 has stopped", Duration::from_secs(20));
}

#[test]
fn a_rank_that_is_stopped_ends_the_others() {
    let root = tempfile::tempdir().unwrap();
    for missing in [1, 0] {
        let processes = at_work(root.path(), "4");
        signal("-STOP", &processes.0[missing]);
        let wanted = format!("rank {missing} has said nothing for 4s");
        others_name(processes, missing, &wanted, Duration::from_secs(30));
    }
}

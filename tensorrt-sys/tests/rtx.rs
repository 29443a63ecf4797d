//! Builds with the TensorRT-RTX library itself, on the CPU: `TRTVLM_TENSORRT`, or where `backend install rtx` puts it.
#![cfg(feature = "rtx")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use tensorrt_sys::{
    AttentionOptions, BuildOptions, BuildSummary, Builder, CausalMaskKind, DataType, ElementWiseOperation, Error,
    Family, Library, MatrixOperation, Network, ShapeRange,
};

/// One test at a time: the log, where failures find their reason, is the library's.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn library() -> &'static Library {
    let installed = || {
        let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
        let data = data.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".local/share"));
        data.join("trtvlm/backends/tensorrt-rtx-1.7.1.116/libtensorrt_rtx.so.1")
    };
    let path = std::env::var_os("TRTVLM_TENSORRT").map(PathBuf::from).unwrap_or_else(installed);
    Library::open(&path).unwrap_or_else(|error| panic!("{error}: `make test` installs the library first"))
}

/// Weights of the test network, alive for as long as it is.
struct Bytes {
    weight: Vec<u8>,
    scale: Vec<u8>,
}

const WIDTH: i64 = 128;

fn bytes() -> Bytes {
    let count = (WIDTH * WIDTH) as usize;
    Bytes {
        weight: (0..count / 2).map(|i| (i * 7 % 251) as u8).collect(),
        // 0.5 in float16.
        scale: [0x00, 0x38].repeat(count / 64),
    }
}

/// x -> INT4 linear -> attention over a cache of 32 rows, 2 heads of 64.
fn write(network: &Network<'_>, dtype: DataType) -> tensorrt_sys::Result<()> {
    let x = network.input("x", dtype, &[-1, -1, WIDTH])?;
    let indices = network.input("indices", DataType::Int32, &[-1])?;
    let lengths = network.input("lengths", DataType::Int32, &[-1])?;
    let cache = network.input("cache", dtype, &[-1, 2, 32, 64])?;
    let heads = network.reshape_transpose("heads", x, &[0, 0, 2, 64], &[0, 2, 1, 3])?;
    let keys = network.kv_cache_update("keys", cache, heads, indices)?;
    network.mark_output("present", keys)?;
    let options = AttentionOptions { causal: CausalMaskKind::None, mask: None, key_value_lengths: Some(lengths) };
    let mixed = network.attention("attention", heads, keys, keys, options)?;
    let mixed = network.transpose("turn", mixed, &[0, 2, 1, 3])?;
    let y = network.reshape("join", mixed, &[0, 0, WIDTH])?;
    network.mark_output("y", y)
}

fn linear<'w>(network: &Network<'w>, bytes: &'w Bytes) -> tensorrt_sys::Result<()> {
    let x = network.input("z", DataType::Half, &[-1, -1, WIDTH])?;
    let weight = network.constant("weight", DataType::Int4, &[1, WIDTH, WIDTH], &bytes.weight)?;
    let scale = network.constant("scale", DataType::Half, &[1, 2, WIDTH], &bytes.scale)?;
    let weight = network.dequantize("dequantize", weight, scale, None, DataType::Half)?;
    let y = network.matrix_multiply("linear", (x, MatrixOperation::None), (weight, MatrixOperation::None))?;
    network.mark_output("product", y)
}

fn options() -> BuildOptions {
    let range = |input: &str, tokens: i64, shape: &dyn Fn(i64, i64) -> Vec<i64>| ShapeRange {
        input: input.into(),
        min: shape(1, 1),
        opt: shape(2, tokens),
        max: shape(4, tokens),
    };
    let profile = |tokens| {
        let wide = |batch, tokens| vec![batch, tokens, WIDTH];
        vec![
            range("x", tokens, &wide),
            range("z", tokens, &wide),
            range("indices", 1, &|batch, _| vec![batch]),
            range("lengths", 1, &|batch, _| vec![batch]),
            range("cache", 1, &|batch, _| vec![batch, 2, 32, 64]),
        ]
    };
    let profiles = vec![profile(16), profile(1)];
    BuildOptions { profiles, compute_capabilities: vec![89, 120], ..BuildOptions::default() }
}

fn build(
    builder: &Builder,
    options: &BuildOptions,
    out: &mut dyn std::io::Write,
) -> tensorrt_sys::Result<BuildSummary> {
    let bytes = bytes();
    let network = builder.network("test")?;
    write(&network, DataType::Half)?;
    linear(&network, &bytes)?;
    builder.build_to(&network, options, out, &mut |_| ControlFlow::Continue(()))
}

#[test]
fn writes_the_plan_and_hashes_it() {
    use sha2::Digest;
    let _alone = alone();
    let mut plan = Vec::new();
    let summary = build(&Builder::new(library()).unwrap(), &options(), &mut plan).unwrap();
    assert_eq!(summary.bytes, plan.len() as u64);
    let hash: String = sha2::Sha256::digest(&plan).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(summary.sha256, hash);
    let text = String::from_utf8_lossy(&plan);
    assert!(text.contains("accelerators={sm89 sm120 }"), "the plan names its GPUs");
}

#[test]
fn describes_what_it_made_of_the_layers() {
    let _alone = alone();
    let builder = Builder::new(library()).unwrap();
    build(&builder, &BuildOptions { describe: true, ..options() }, &mut Vec::new()).unwrap();
    let description = builder.take_description().unwrap();
    // Attention is one fused kernel, the INT4 product another that reads the weights as they are.
    assert!(description.contains("_gemm_mha_v2"), "{description}");
    assert!(description.contains("LayerType: runtime_fusion"), "{description}");
    assert!(description.contains("Datatype: Int4"), "{description}");
}

#[test]
fn says_which_layer_does_not_fit() {
    let _alone = alone();
    assert_eq!(library().family(), Family::Rtx);
    let builder = Builder::new(library()).unwrap();
    let network = builder.network("test").unwrap();
    let a = network.input("a", DataType::Half, &[2, 3]).unwrap();
    let b = network.input("b", DataType::Half, &[4, 5]).unwrap();
    let error = network
        .matrix_multiply("product", (a, MatrixOperation::None), (b, MatrixOperation::None))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("product") && error.contains("but must match"), "{error}");
    let c = network.input("c", DataType::Float, &[2, 3]).unwrap();
    let error = network.elementwise("sum", a, c, ElementWiseOperation::Sum).err().unwrap().to_string();
    assert!(error.contains("Half and Float"), "{error}");
    for (what, error) in [
        ("permutation", network.transpose("t", a, &[0, 2]).err()),
        ("axis", network.concatenation("c", &[a], 2).err()),
        ("does not fill", network.constant("k", DataType::Int4, &[3, 3], &[0; 5]).err()),
        ("do not fit", network.dequantize("d", a, b, Some(1), DataType::Half).err()),
    ] {
        let error = error.unwrap();
        assert!(matches!(error, Error::Argument { .. }) && error.to_string().contains(what), "{what}: {error}");
    }
}

#[test]
fn stops_when_told_to() {
    let _alone = alone();
    let builder = Builder::new(library()).unwrap();
    let bytes = bytes();
    let network = builder.network("test").unwrap();
    write(&network, DataType::Half).unwrap();
    linear(&network, &bytes).unwrap();
    let mut steps = 0;
    let result = builder.build_to(&network, &options(), &mut Vec::new(), &mut |progress| {
        steps += 1;
        assert!(progress.step <= progress.steps);
        ControlFlow::Break(())
    });
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    assert_eq!(steps, 1);
}

#[test]
fn notices_a_failing_write() {
    let _alone = alone();
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if bytes.len() > self.0 { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(bytes.len()) }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let result = build(&Builder::new(library()).unwrap(), &options(), &mut Full(100));
    assert!(matches!(result, Err(Error::Write(_))), "{result:?}");
}

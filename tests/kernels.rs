//! Every kernel compiles for every GPU generation that TensorRT 10 is built for. NVRTC needs no GPU; `make test` gets it.
#![cfg(feature = "rtx")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
use graphs::DType;
use tensorrt_sys::Plugin;
use trtvlm::backend::{Kind, find};
use trtvlm::calibration::KERNELS;
use trtvlm::plugins::{
    AttentionPlugin, AttentionShape, CollectivePlugin, CollectiveShape, Compiler, GreedyPlugin, Join,
};

const GPUS: [u32; 3] = [80, 89, 90];

fn compiler(gpu: u32) -> Compiler {
    Compiler::new(&find(Kind::Nvrtc).unwrap(), gpu).unwrap()
}

/// What an engine stores holds machine code, an ELF file, with every kernel that is started by its name.
fn assert_carries(state: &[u8], kernels: &[&str]) {
    let holds = |wanted: &[u8]| state.windows(wanted.len()).any(|bytes| bytes == wanted);
    assert!(holds(b"\x7fELF"));
    for name in kernels {
        assert!(holds(format!("\0trtvlm_{name}\0").as_bytes()), "{name}");
    }
}

#[test]
fn attention_compiles_for_every_gpu_type_and_head() {
    for gpu in GPUS {
        let compiler = compiler(gpu);
        for dtype in [DType::Float32, DType::Float16, DType::Bfloat16] {
            // Odd widths take the plain loads; 64 and 128 the wide ones; 256 the most shared memory.
            let heads = [(6, false), (8, true), (64, true), (80, false), (128, true), (256, false)];
            // With a bias by distance: T5's heads, of the tests and of flan-t5.
            let plain = heads.map(|(head_dim, rotary)| (head_dim, rotary, false));
            let shapes = plain.into_iter().chain([(8, false, true), (64, false, true)]);
            // INT8 caches once for each kind of loads, tiles among them, and once with a bias.
            let kept = match dtype {
                DType::Float16 => [(64, true, false), (128, true, false)],
                DType::Bfloat16 => [(80, false, false), (64, false, true)],
                _ => [(6, false, false), (256, false, false)],
            };
            let kinds = shapes.map(|shape| (shape, false)).chain(kept.map(|shape| (shape, true)));
            for ((head_dim, rotary, bias), int8_cache) in kinds {
                // 80 as OPT-2.7B has it: learned positions.
                let causal = rotary || head_dim == 80 || bias;
                let kv_heads = if bias { 4 } else { 2 };
                let (heads, scale) = (4, 0.125);
                let shape =
                    AttentionShape { dtype, heads, kv_heads, head_dim, scale, rotary, causal, bias, int8_cache };
                let plugin = AttentionPlugin::new(shape, &compiler).unwrap();
                assert_carries(&plugin.state(), &AttentionPlugin::KERNELS);
                if dtype != DType::Float32 && [64, 80, 128].contains(&head_dim) {
                    assert_carries(&plugin.state(), &[AttentionPlugin::TILES]);
                }
            }
        }
    }
}

#[test]
fn the_greedy_choice_compiles_for_every_gpu() {
    for gpu in GPUS {
        assert_carries(&GreedyPlugin::new(&compiler(gpu)).unwrap().state(), &GreedyPlugin::KERNELS);
    }
}

#[test]
fn what_joins_ranks_compiles_for_every_gpu_and_type() {
    for gpu in GPUS {
        let compiler = compiler(gpu);
        for dtype in [DType::Float32, DType::Float16, DType::Bfloat16] {
            let plugin =
                CollectivePlugin::new(CollectiveShape { join: Join::Sum, dtype, ranks: 2 }, &compiler).unwrap();
            assert_carries(&plugin.state(), &CollectivePlugin::KERNELS);
        }
    }
}

#[test]
fn calibration_compiles_for_every_gpu() {
    for gpu in GPUS {
        let code = compiler(gpu).compile("calibration.cu", KERNELS, Vec::new()).unwrap();
        let started =
            ["widen", "split", "pair", "along", "scale", "activation", "norm", "rotate", "rows", "columns", "softmax"];
        assert_carries(&code, &started);
    }
}

#[test]
fn a_refused_source_carries_the_log() {
    let compiler = compiler(90);
    let error = compiler.compile("broken.cu", "__global__ void f() { missing(); }", Vec::new()).unwrap_err();
    assert!(error.to_string().contains("identifier \"missing\" is undefined"), "{error}");
}

//! Adapters of every kind that Python's `peft` opens, on a model.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use lowrank_models::Llama;
use lowrank_models::adapter::{AdapterConfig, Attach, GivenTensors, Scaling, Targets, TensorRole, each_adapter};

/// Adapters that `peft` has, or that it can read as plain LoRA.
pub fn exchanged() -> Vec<(&'static str, AdapterConfig)> {
    let lora = || AdapterConfig::new("lora").with_rank(4).with_alpha(6.0);
    let start = |init: &str| AdapterConfig { init: init.into(), ..lora() };
    vec![
        ("lora", lora()),
        ("stabilised", AdapterConfig { scaling: Some(Scaling::RootRank), ..lora() }),
        (
            "patterns",
            AdapterConfig {
                rank_pattern: vec![("layers.1.*_proj".into(), 2), ("q_proj".into(), 6)],
                alpha_pattern: vec![("q_proj".into(), 3.0)],
                ..lora()
            },
        ),
        (
            "chosen",
            AdapterConfig {
                exclude: Some(Targets::parse("k_proj")),
                layers: Some(vec![0, 2]),
                ..AdapterConfig::new("lora")
            },
        ),
        ("regex", lora().with_targets(Targets::parse(r".*\.[02]\.(mlp|self_attn)\.[qg]\w*_proj"))),
        (
            "look-ahead",
            AdapterConfig {
                rank_pattern: vec![(r".*layers\.(?!1\b)\d+\.mlp\.up_proj".into(), 2)],
                ..lora().with_targets(Targets::parse(r"(?!.*\.1\.self_attn).*(?<!gate)_proj"))
            },
        ),
        ("pissa", start("pissa")),
        ("olora", start("olora")),
        ("dora", AdapterConfig::new("dora").with_rank(4).with_alpha(6.0)),
        ("vera", AdapterConfig::new("vera").with_rank(8)),
        ("randlora", AdapterConfig::new("randlora").with_rank(5).with_option("dist", "normal")),
        ("randlora-sparse", AdapterConfig::new("randlora").with_rank(4).with_alpha(20.0).with_option("sparse", true)),
        ("lora-xs", AdapterConfig::new("lora-xs").with_rank(4)),
        ("block-lora", AdapterConfig::new("block-lora").with_rank(8).with_option("blocks", 2)),
        ("bat", AdapterConfig::new("bone").with_rank(4)),
        ("miss", AdapterConfig::new("bone").with_rank(5).with_option("mode", "shared")),
        ("embedding", lora().with_targets(Targets::parse("embed_tokens,lm_head,v_proj"))),
        ("whole", AdapterConfig { modules_to_save: vec!["embed_tokens".into(), "lm_head".into()], ..lora() }),
        (
            "loha",
            AdapterConfig { rank_pattern: vec![("down_proj".into(), 2)], ..AdapterConfig::new("loha").with_rank(3) },
        ),
        ("lokr", AdapterConfig::new("lokr").with_rank(2)),
        (
            "lokr-both",
            AdapterConfig::new("lokr")
                .with_rank(1)
                .with_option("decompose_both", true)
                .with_option("decompose_factor", 4),
        ),
        ("oft", AdapterConfig::new("oft").with_option("oft_block_size", 8).with_option("use_cayley_neumann", false)),
        ("oft-series", AdapterConfig::new("oft").with_option("blocks", 4)),
        ("oft-shared", AdapterConfig::new("oft").with_option("oft_block_size", 5).with_option("block_share", true)),
        ("ia3", AdapterConfig::new("ia3").with_targets(Targets::parse("k_proj,v_proj,down_proj"))),
        (
            "ia3-left-out",
            AdapterConfig {
                exclude: Some(Targets::parse("v_proj")),
                layers: Some(vec![0, 2]),
                ..AdapterConfig::new("ia3").with_targets(Targets::parse("k_proj,v_proj,down_proj"))
            },
        ),
        ("ia3-outputs", AdapterConfig::new("ia3").with_targets(Targets::parse("k_proj,v_proj"))),
        ("hira", AdapterConfig::new("hira").with_rank(4)),
        ("gated", AdapterConfig::new("gated").with_rank(4)),
        ("nested", AdapterConfig::new("nested").with_rank(3)),
        ("triplet", AdapterConfig::new("triplet").with_rank(3)),
        ("shira", AdapterConfig::new("shira").with_rank(2)),
        (
            "fourierft",
            AdapterConfig {
                rank_pattern: vec![("down_proj".into(), 20)],
                ..AdapterConfig::new("fourierft").with_rank(12).with_option("random_loc_seed", 5)
            },
        ),
        ("mini", AdapterConfig::new("bone").with_rank(4).with_option("mode", "shared_mini").with_option("mini_r", 4)),
    ]
}

/// The model with an adapter whose tensors are no longer those it began with.
pub fn adapted(base: &Llama, config: &AdapterConfig) -> Llama {
    let mut base = base.clone();
    if !config.modules_to_save.is_empty() {
        let moved = |weight: Tensor<2>| weight.clone() + weight.square().mul_scalar(0.5);
        base.model.embed_tokens.weight = base.model.embed_tokens.weight.map(moved);
        base.lm_head = base.lm_head.map(|mut head| {
            head.weight = head.weight.map(moved);
            head
        });
    }
    let (fresh, _) = base.clone().attach(Attach::new(config.clone())).unwrap();
    let mut tensors = BTreeMap::new();
    each_adapter(&fresh, |path, adapter| {
        let moved = adapter.stack[0].tensors().into_iter().map(|(tensor, data)| {
            let shape = data.shape().as_slice().to_vec();
            let mut values: Vec<f32> = data.try_into_vec().expect("f32");
            if tensor.role != TensorRole::Frozen {
                let noise = |place: usize| ((place * place + path.len()) as f32 * 0.7).sin();
                values.iter_mut().enumerate().for_each(|(place, value)| *value += 0.05 * noise(place));
            }
            if matches!(tensor.field.as_str(), "gate" | "e.0") {
                // Some components have been pruned, and all of one layer.
                let gone = |place: usize| path.ends_with("1.self_attn.q_proj") || place == path.len() % 3;
                values.iter_mut().enumerate().filter(|(place, _)| gone(*place)).for_each(|(_, value)| *value = 0.0);
            }
            (tensor.field, TensorData::new(values, shape))
        });
        tensors.insert(path.to_string(), moved.collect::<GivenTensors>());
    });
    base.clone().attach(Attach::new(config.clone()).with_tensors(tensors)).unwrap().0
}

//! Every structure of the registry, the same tests. A structure that a test cannot build fails it: say in [`settings`] what it needs.

#[path = "adapter_formula.rs"]
mod formula;

#[path = "adapter_layers.rs"]
mod layers;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::adapter::{
    Adapter, AdapterConfig, AdapterOptions, Attach, Control, PassInfo, Rank, STRUCTURES, Scaling, Spec, Targets,
    TensorRole, detach, merged, merged_with_unmerge_state, unmerged,
};

use layers::*;

#[test]
fn layers_start_as_the_base() {
    let base = all_values(layers().outputs());
    each_start(|entry, config, name| {
        let (layers, _) = attach(config);
        let apart = apart(&all_values(layers.outputs()), &base);
        match (config.initialisation().is_some_and(|init| init.changes_output), entry.spec.name) {
            (true, _) => assert!(apart > 1e-4, "{name} was expected to leave the base; {apart}"),
            // Its square begins at random numbers of deviation 1e-5.
            (false, "lora-xs") => assert!(apart < 1e-3, "{name}: {apart} away"),
            // Its update is small at the start, and not zero.
            (false, "snell") => assert!(apart > 0.0 && apart < 1e-2, "{name}: {apart} away"),
            (false, _) => assert!(apart < 1e-5, "{name}: {apart} away"),
        }
    });
}

#[test]
fn merged_layers_equal_unmerged_ones() {
    each_start(|entry, config, name| {
        if let Err(reason) = entry.spec.merges {
            return assert!(!reason.is_empty(), "{name} says why it does not merge");
        }
        let (layers, _) = trained(config);
        let before = all_values(layers.outputs());
        let together = merged(layers).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(newest(&together).is_empty(), "{name}");
        let apart = apart(&all_values(together.outputs()), &before);
        assert!(apart < 1e-5, "{name}: {apart} away");
    });
}

#[test]
fn merged_layers_come_apart_again() {
    each_start(|entry, config, name| {
        let (layers, _) = trained(config);
        if entry.spec.merges.is_err() {
            return assert!(merged_with_unmerge_state(layers).is_err(), "{name}");
        }
        let bias = |layers: &Layers| bits(&host(layers.tall.bias.as_ref().expect("a bias").val()));
        let (before, own) = (all_values(layers.outputs()), bias(&layers));
        let (together, unmerge_state) =
            merged_with_unmerge_state(layers).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(bias(&together) != own, entry.spec.changes_bias, "{name}");
        let back = unmerged(together.clone(), unmerge_state.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(bias(&back), own, "{name}");
        let away = apart(&all_values(back.outputs()), &before);
        assert!(away < 1e-5, "{name}: {away} away");
        let mut other = together;
        other.tall.bias = other.tall.bias.map(|bias| bias.map(|bias| bias + 1.0));
        let refusal = unmerged(other, unmerge_state).err().map(|error| error.to_string());
        match (entry.spec.changes_bias, refusal) {
            (true, refusal) => assert!(refusal.is_some_and(|text| text.contains("the bias of tall")), "{name}"),
            (false, refusal) => assert_eq!(refusal, None, "{name}"),
        }
    });
}

/// A bias of the branches goes into that of the layer; a layer without one has no place for it.
#[test]
fn biases_of_branches_are_merged_where_the_layer_has_one() {
    let config = AdapterConfig::new("hydra").with_option("branch_bias", true);
    let (everywhere, _) = trained(&config);
    let refusal = merged(everywhere).unwrap_err().to_string();
    assert!(refusal.contains("needs a bias") && !refusal.contains("tall"), "{refusal}");
    let (layers, report) = trained(&config.with_targets(Targets::parse("tall")));
    let before = all_values(layers.outputs());
    let together = merged(layers.clone()).expect("a layer with a bias");
    assert!(apart(&all_values(together.outputs()), &before) < 1e-5);
    report.control.switch(false);
    let off = merged(layers.clone()).expect("adapters that are off are dropped");
    assert_eq!(bits(&all_values(off.outputs())), bits(&all_values(layers.outputs())));
}

#[test]
fn what_was_merged_can_be_taken_out_again() {
    each_start(|_, config, name| {
        let (layers, _) = trained(config);
        for (layer, attached) in layers.all().into_iter().zip(newest_in_order(&layers)) {
            let Some(back) = attached.unmerged(layer.weight.val().inner()) else { continue };
            let apart = apart(&host(back), &host(layer.weight.base()));
            assert!(apart < 1e-5, "{name}: {apart} away");
        }
    });
}

fn newest_in_order(layers: &Layers) -> Vec<Adapter> {
    let mut found = newest(layers);
    SHAPES.iter().filter_map(|(name, _)| found.remove(*name)).collect()
}

#[test]
fn off_and_detached_layers_have_the_bits_of_the_base() {
    let base = layers();
    let (outputs, weights) = (bits(&all_values(base.outputs())), base.weights());
    each_start(|_, config, name| {
        let (layers, report) = trained(config);
        assert_eq!(layers.weights(), weights, "{name} left the stored weights alone");
        let on = all_values(layers.outputs());
        report.control.switch(false);
        assert_eq!(bits(&all_values(layers.outputs())), outputs, "{name} off");
        report.control.switch(true);
        assert_eq!(bits(&all_values(layers.outputs())), bits(&on), "{name} on again");
        let layers = detach(layers, "default").expect("an adapter of this name");
        assert!(newest(&layers).is_empty(), "{name}");
        assert_eq!(bits(&all_values(layers.outputs())), outputs, "{name} detached");
    });
}

#[test]
fn trained_tensors_move_and_all_others_stay() {
    each_start(|_, config, name| {
        let (layers, _) = attach(config);
        let (before, weights) = (state(&layers), layers.weights());
        let bias = host(layers.tall.bias.as_ref().expect("a bias").val());
        let mut seen: BTreeMap<(String, String), bool> = BTreeMap::new();
        let layers = train(layers, |grads, layers| {
            for (layer, attached) in newest(layers) {
                for tensor in attached.shapes() {
                    let moves = match tensor.shape.len() {
                        1 => peek::<1>(grads, tensor.id),
                        2 => peek::<2>(grads, tensor.id),
                        3 => peek::<3>(grads, tensor.id),
                        _ => peek::<4>(grads, tensor.id),
                    };
                    *seen.entry((layer.clone(), tensor.field)).or_default() |= moves;
                }
            }
            assert!(layers.all().iter().all(|layer| grads.get::<2>(layer.weight.id).is_none()), "{name}: the base");
        });
        for (key, (role, now)) in state(&layers) {
            let moved = bits(&now) != bits(&before[&key].1);
            let is_trained = role != TensorRole::Frozen;
            assert_eq!(seen[&key], is_trained, "{name} {key:?}: a gradient");
            assert_eq!(moved, is_trained, "{name} {key:?}: moves");
            assert!(now.iter().all(|value| value.is_finite()), "{name} {key:?}");
        }
        assert_eq!(layers.weights(), weights, "{name}");
        assert_eq!(host(layers.tall.bias.as_ref().expect("a bias").val()), bias, "{name}");
    });
}

/// Returns true if there is a gradient that is not zero.
fn peek<const D: usize>(grads: &GradientsParams, id: burn::module::ParamId) -> bool {
    grads.get::<D>(id).is_some_and(|grad| host(grad).iter().any(|value| *value != 0.0))
}

#[test]
fn counts_are_those_that_are_promised() {
    struct Count {
        inside: usize,
        trained: usize,
        frozen: usize,
    }
    impl ModuleVisitor for Count {
        fn enter_module(&mut self, _name: &str, container: &str) {
            self.inside += usize::from(container == "Reparameterization");
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.inside -= usize::from(container == "Reparameterization");
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let count = param.lazy_shape().num_elements();
            match (self.inside > 0, param.is_require_grad()) {
                (true, true) => self.trained += count,
                (true, false) => self.frozen += count,
                (false, tracked) => assert!(!tracked, "the base is frozen"),
            }
        }
    }
    each(|entry, config, name| {
        let (layers, report) = attach(config);
        let mut count = Count { inside: 0, trained: 0, frozen: 0 };
        layers.visit(&mut count);
        assert_eq!(report.trained(), count.trained, "{name}");
        let kept: usize = newest(&layers).values().map(|attached| attached.structure().cached_values()).sum();
        let frozen = count.frozen + kept;
        assert_eq!(report.layers.iter().map(|layer| layer.frozen).sum::<usize>(), frozen, "{name}");
        let defaults = entry.entry.options();
        let defaults = defaults.iter().filter_map(|option| Some((option.name.clone(), option.default.clone()?)));
        let mut options: AdapterOptions = defaults.collect();
        options.extend(config.options.clone());
        // What follows from factors of the sides is told in words; the structures' own tests count it.
        let in_words = ["tera", "tlora", "lokr"].contains(&entry.spec.name);
        for layer in report.layers.iter().filter(|_| !in_words) {
            let promised = formula::value(entry.spec.trains, &layer.place, &options)
                .unwrap_or_else(|error| panic!("{name} trains \"{}\": {error}", entry.spec.trains));
            assert_eq!(layer.trained, promised, "{name} [{:?}]: {}", layer.place.shape, entry.spec.trains);
        }
        // What layers share is there once, whoever shares it.
        let shared: BTreeMap<&String, &u64> = report.layers.iter().flat_map(|layer| &layer.shared).collect();
        let bytes = frozen as u64 * 4 + shared.values().copied().sum::<u64>();
        assert_eq!(report.frozen_bytes(), bytes, "{name}");
        assert_eq!(bytes > 0, !entry.spec.stores.is_empty(), "{name} stores \"{}\"", entry.spec.stores);
    });
}

#[test]
fn adapters_come_back_from_a_file_to_the_bit() {
    each_start(|_, config, name| {
        let (layers, _) = trained(config);
        let tensors = written(&layers);
        // The random matrices of NOLA stand in no file: its seed must be the one that they were drawn with.
        let seed = if config.structure == "nola" { config.seed } else { config.seed + 1 };
        let other = AdapterConfig { seed, ..config.clone() };
        let back = Attach::new(other).with_tensors(tensors.clone()).factored().to(self::layers());
        let (back, _) = back.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(bits(&all_values(back.outputs())), bits(&all_values(layers.outputs())), "{name}");
        for (layer, given) in written(&back) {
            for (field, data) in given {
                assert_eq!(data, tensors[&layer][&field], "{name} {layer} {field}");
            }
        }
        let mut more = tensors.clone();
        more.get_mut("wide").expect("a layer").insert("more".into(), TensorData::zeros::<f32, _>([1]));
        let error = Attach::new(config.clone()).with_tensors(more).factored().to(self::layers()).unwrap_err();
        assert!(error.to_string().contains("no place"), "{name}: {error}");
        let mut less = tensors;
        less.get_mut("wide").expect("a layer").pop_first();
        let error = Attach::new(config.clone()).with_tensors(less).factored().to(self::layers()).unwrap_err();
        assert!(error.to_string().contains("missing"), "{name}: {error}");
    });
}

#[test]
fn ranks_from_one_to_the_smaller_side_train() {
    each(|entry, _, name| {
        for rank in [1, 12] {
            let (layers, report) = attach(&settings(entry, rank));
            let before = host(layers.loss())[0];
            let layers = train(layers, |_, _| ());
            let after = host(layers.loss())[0];
            assert!(after < before, "{name} of rank {rank}: loss {before} to {after}");
            if entry.spec.merges.is_ok() {
                let together = merged(layers.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
                let apart = apart(&all_values(together.outputs()), &all_values(layers.outputs()));
                assert!(apart < 1e-5, "{name} of rank {rank}: {apart} away");
            }
            assert!(report.trained() > 0, "{name}");
        }
    });
}

#[test]
fn adapters_stack_and_switch_alone() {
    let base = bits(&all_values(layers().outputs()));
    let lora = &STRUCTURES[0];
    for (below, above) in STRUCTURES.iter().flat_map(|entry| [(entry, entry), (lora, entry), (entry, lora)]) {
        let name = format!("{} on {}", above.spec.name, below.spec.name);
        let (layers, first) = trained(&settings(below, 4));
        let one = all_values(layers.outputs());
        let frozen = state(&layers);
        let config = AdapterConfig { name: "second".into(), ..settings(above, 4) };
        let (layers, second) = attach_to(layers, &config);
        let start = apart(&all_values(layers.outputs()), &one);
        let near = match above.spec.name {
            "lora-xs" => 1e-3,
            "snell" => 1e-2,
            _ => 1e-5,
        };
        assert!(start < near, "{name} starts {start} away");
        let layers = train(layers, |_, _| ());
        let both = all_values(layers.outputs());
        assert!(apart(&both, &one) > 1e-4, "{name}: the second one learns");
        second.control.switch(false);
        assert_eq!(bits(&all_values(layers.outputs())), bits(&one), "{name}: the first alone");
        first.control.switch(false);
        assert_eq!(bits(&all_values(layers.outputs())), base, "{name}: none");
        second.control.switch(true);
        let alone = all_values(layers.outputs());
        assert!(alone.iter().all(|value| value.is_finite()) && bits(&alone) != base, "{name}: the second alone");
        first.control.switch(true);
        assert_eq!(bits(&all_values(layers.outputs())), bits(&both), "{name}: both");
        if below.spec.merges.is_ok() && above.spec.merges.is_ok() {
            let together = merged(layers.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
            let together = apart(&all_values(together.outputs()), &both);
            assert!(together < 2e-5, "{name}: merged {together} away");
        }
        let layers = detach(layers, "second").expect("an adapter of this name");
        assert_eq!(bits(&all_values(layers.outputs())), bits(&one), "{name}: the first again");
        assert_eq!(state(&layers), frozen, "{name}: the first did not move");
    }
}

#[test]
fn what_has_no_meaning_is_refused() {
    let refused = |config: AdapterConfig, what: &str| {
        let name = config.structure.clone();
        match Attach::new(config).with_gradients(gradients()).factored().to(layers()) {
            Ok(_) => panic!("{name}: {what} was accepted"),
            Err(error) => assert!(error.to_string().contains(what), "{name}: {error}"),
        }
    };
    each(|entry, config, name| {
        let Spec { rank, alpha, dropout, .. } = entry.spec;
        refused(config.clone().with_option("no_such_option", 1), "no_such_option");
        refused(AdapterConfig { init: "no-such-start".into(), ..config.clone() }, "no-such-start");
        let zero = AdapterConfig { rank: Some(0), ..config.clone() };
        refused(zero, "adapter.rank = 0");
        if *rank == Rank::None {
            refused(config.clone().with_rank(4), "has no rank");
        }
        match alpha {
            lowrank_models::adapter::Alpha::None => {
                refused(config.clone().with_alpha(2.0), "has no alpha");
                refused(AdapterConfig { scaling: Some(Scaling::RootRank), ..config.clone() }, "has no scale");
            }
            _ => {
                refused(config.clone().with_alpha(0.0), "alpha above 0");
                refused(config.clone().with_alpha(f64::NAN), "alpha above 0");
            }
        }
        if !dropout {
            refused(AdapterConfig { dropout: 0.1, ..config.clone() }, "has no dropout");
        }
        refused(AdapterConfig { dropout: 1.0, ..config.clone() }, "dropout");
        let undocumented = entry.entry.options().iter().find(|option| option.help.is_empty()).cloned();
        assert_eq!(undocumented, None, "{name} says what its options do");
    });
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    each_start(|_, config, name| {
        let [one, two] = [(); 2].map(|()| trained(config).0);
        assert_eq!(bits(&all_values(one.outputs())), bits(&all_values(two.outputs())), "{name}");
    });
}

#[test]
fn dropout_drops_the_same_values_again() {
    each(|entry, _, name| {
        if !entry.spec.dropout {
            return;
        }
        let (layers, report) = trained(&dropping(entry, 0.5));
        let at = |pass: u64| {
            let pass = PassInfo { training: pass > 0, ..PassInfo::training(pass.saturating_sub(1), None) };
            report.control.set_pass(pass);
            bits(&all_values(layers.outputs()))
        };
        assert_eq!(at(3), at(3), "{name}");
        assert_ne!(at(3), at(4), "{name}");
        let whole = at(0);
        assert_ne!(at(3), whole, "{name}");
        let plain = trained(&dropping(entry, 0.0)).0;
        assert_eq!(bits(&all_values(plain.outputs())), whole, "{name}: off outside of training");
    });
}

#[test]
fn layers_of_burn_get_the_same_numbers() {
    each_start(|entry, config, name| {
        let biased = !entry.spec.changes_bias;
        let mut ours = layers();
        ours.tall.bias = ours.tall.bias.filter(|_| biased);
        let (ours, _) = attach_to(ours, config);
        let ours = train(ours, |_, _| ());
        let attach = Attach::new(config.clone()).with_tensors(written(&ours));
        let (theirs, _) = attach.to(burn_layers(biased)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let outputs = || {
            let [tall, wide, square] = inputs();
            [theirs.tall.forward(tall), theirs.wide.forward(wide), theirs.square.forward(square)]
        };
        let together = apart(&all_values(outputs()), &all_values(ours.outputs()));
        assert!(together < 1e-5, "{name}: {together} away");
        let mut one = GradientsParams::from_grads(ours.loss().backward(), &ours);
        let mut two = GradientsParams::from_grads(loss(outputs()).backward(), &theirs);
        let theirs = newest(&theirs);
        for (layer, attached) in newest(&ours) {
            for (ours, theirs) in attached.shapes().into_iter().zip(theirs[&layer].shapes()) {
                if ours.role == TensorRole::Frozen {
                    continue;
                }
                let [one, two] = match ours.shape.len() {
                    1 => [slope::<1>(&mut one, ours.id), slope::<1>(&mut two, theirs.id)],
                    2 => [slope::<2>(&mut one, ours.id), slope::<2>(&mut two, theirs.id)],
                    3 => [slope::<3>(&mut one, ours.id), slope::<3>(&mut two, theirs.id)],
                    _ => [slope::<4>(&mut one, ours.id), slope::<4>(&mut two, theirs.id)],
                };
                let apart = apart(&one, &two);
                assert!(apart < 1e-4, "{name} {layer} {}: gradients {apart} away", ours.field);
            }
        }
        if entry.spec.changes_bias {
            let error = Attach::new(config.clone()).with_gradients(gradients()).to(burn_layers(true)).unwrap_err();
            assert!(error.to_string().contains("bias"), "{name}: {error}");
        }
    });
}

/// The gradient of a tensor; empty for gates, which only a penalty moves outside of training.
fn slope<const D: usize>(grads: &mut GradientsParams, id: burn::module::ParamId) -> Vec<f32> {
    grads.remove::<D>(id).map_or_else(Vec::new, host)
}

#[test]
fn names_are_told_apart() {
    let names: Vec<&str> = STRUCTURES.iter().map(|entry| entry.spec.name).collect();
    let mut sorted = names.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), names.len());
    for entry in STRUCTURES {
        let Spec { name, title, arxiv, .. } = entry.spec;
        assert!(entry.lr > 0.0 && !title.is_empty(), "{name}");
        let id = arxiv.len() == 10 && arxiv.chars().all(|c| c.is_ascii_digit() || c == '.');
        assert!(id || arxiv.ends_with(|last: char| last.is_ascii_digit()) && arxiv.contains(' '), "{name}: {arxiv}");
    }
    let (layers, report) = attach(&settings(&STRUCTURES[0], 4));
    let again = Attach::new(settings(&STRUCTURES[0], 4)).factored().to(layers).unwrap_err();
    assert!(again.to_string().contains("of this name"), "{again}");
    let control: &Control = &report.control;
    assert_eq!(control.name(), "default");
}

//! Modules that are trained whole beside an adapter, such as a new classifier: `modules_to_save` of `peft`.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use lowrank_optim::ModulePath;

/// Paths of the modules that have trained weights besides those of adapters.
pub(super) fn trained_modules<M: Module>(module: &M) -> BTreeSet<String> {
    #[derive(Default)]
    struct Walk {
        path: ModulePath,
        adapters: usize,
        modules: BTreeSet<String>,
    }
    impl ModuleVisitor for Walk {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.adapters += usize::from(container == "Reparameterization");
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, container: &str) {
            self.adapters -= usize::from(container == "Reparameterization");
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.path.joined();
            // Biases are trained by themselves as well.
            if self.adapters == 0 && param.is_require_grad() && !path.ends_with(".bias") {
                self.modules.insert(path.rsplit_once('.').map_or(path.as_str(), |(module, _)| module).to_string());
            }
        }
    }
    let mut walk = Walk::default();
    module.visit(&mut walk);
    walk.modules
}

/// Whole paths of the modules that parameters with these names belong to. `peft` compares the ends of names without regard to dots: "norm" would
/// take `input_layernorm` too.
pub(super) fn whole_paths<'a>(parameters: impl Iterator<Item = &'a String>, modules: &[String]) -> Vec<String> {
    let own = |name: &'a String| {
        let around = name.match_indices('.').map(|(dot, _)| &name[..dot]);
        around.into_iter().find(|module| modules.iter().any(|saved| ends_with(module, saved))).map(str::to_string)
    };
    parameters.filter_map(own).collect::<BTreeSet<_>>().into_iter().collect()
}

fn ends_with(module: &str, saved: &str) -> bool {
    module == saved || module.ends_with(&format!(".{saved}"))
}

/// Returns true if a parameter with this name belongs to one of the modules, as `peft` compares them: by the end of the path of a module
/// around it.
pub(super) fn is_of(name: &str, modules: &[String]) -> bool {
    let around = name.match_indices('.').map(|(dot, _)| &name[..dot]);
    around.into_iter().any(|module| modules.iter().any(|saved| ends_with(module, saved)))
}

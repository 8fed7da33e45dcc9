// Run what `skimp export --to pt2` wrote, with no Python: libtorch is all it needs.
//
//   run MODEL.pt2 TAU BATCH LENGTH OUTPUT
//
// The model takes the tokens and the attention mask of BATCH texts of LENGTH. Its first output goes
// to the file OUTPUT, as float32 numbers.
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

// A package holds its kernels in a library of their own, which has to be loaded before the model.
static void load_kernels(const std::string& package) {
  caffe2::serialize::PyTorchStreamReader reader(package);
  const auto [data, size] = reader.getRecord("skimp/kernels.so");
  char path[] = "/tmp/skimp-kernels-XXXXXX";
  const int file = mkstemp(path);
  TORCH_CHECK(file >= 0 && write(file, data.get(), size) == ssize_t(size), "cannot write ", path);
  close(file);
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  unlink(path);
  TORCH_CHECK(library, "the kernels cannot be loaded: ", dlerror());
  const auto unsupported = (const char* (*)())dlsym(library, "skimp_unsupported");
  TORCH_CHECK(unsupported, package, " holds kernels that are not skimp's");
  if (const char* lacking = unsupported()) TORCH_CHECK(false, package, ": ", lacking);
}

// Thresholds are constants of the model, named BLOCK.tau; 0 runs every expert.
static void set_tau(torch::inductor::AOTIModelPackageLoader& model, float tau) {
  std::unordered_map<std::string, at::Tensor> values;
  for (const std::string& name : model.get_constant_fqns())
    if (name.size() > 4 && name.compare(name.size() - 4, 4, ".tau") == 0)
      values[name] = at::scalar_tensor(tau);
  model.load_constants(values, /*use_inactive=*/false, /*check_full_update=*/false);
}

int main(int count, char** given) try {
  TORCH_CHECK(count == 6, "usage: run MODEL.pt2 TAU BATCH LENGTH OUTPUT");
  load_kernels(given[1]);
  torch::inductor::AOTIModelPackageLoader model(given[1]);
  set_tau(model, std::stof(given[2]));
  const int64_t batch = std::stol(given[3]), length = std::stol(given[4]);
  const at::Tensor tokens = at::arange(batch * length, at::kLong).remainder(50).add(5);
  const at::Tensor mask = at::ones({batch, length}, at::kLong);
  // inputs are in the order of skimp/index.json in the package, by name
  const at::Tensor y = model.run({tokens.view({batch, length}), mask})[0].contiguous();
  std::ofstream(given[5], std::ios::binary).write((const char*)y.const_data_ptr(), y.nbytes());
  std::printf("%s\n", c10::str(y.sizes()).c_str());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}

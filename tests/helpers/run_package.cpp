// program PACKAGE: runs a package of AOTInductor without Python, on inputs made here, and prints the numbers of its output.
#include <cstdio>

#include <ATen/ops/arange.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

static at::Tensor input(at::IntArrayRef shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    return at::arange(count, at::kFloat).sin().view(shape);
}

int main(int count, char** words) {
    if (count != 2) return 2;
    torch::inductor::AOTIModelPackageLoader loader(words[1]);
    for (const int64_t queries : {5, 9}) {
        const at::Tensor value = input({2, 54, 2, 4});
        const at::Tensor locations = input({2, queries, 2, 2, 3, 2});
        const at::Tensor weights = input({2, queries, 2, 2, 3});
        const at::Tensor output = loader.run({value, locations, weights}).at(0).contiguous();
        const float* numbers = output.const_data_ptr<float>();
        for (int64_t i = 0; i < output.numel(); ++i) std::printf("%.9g\n", numbers[i]);
    }
    return 0;
}

/* symbols.cpp: reads the table of symbols of the file that a function is in. */
#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <vector>

namespace {

/* Symbols of functions in an ELF file, by their offset from where the file is loaded. */
std::map<uintptr_t, std::string> read_functions(const char *path) {
    std::map<uintptr_t, std::string> functions;
    FILE *file = fopen(path, "rb");
    if (!file) return functions;
    std::vector<char> all;
    fseek(file, 0, SEEK_END);
    all.resize((size_t)ftell(file));
    rewind(file);
    if (fread(all.data(), 1, all.size(), file) != all.size()) all.clear();
    fclose(file);
    if (all.size() < sizeof(Elf64_Ehdr)) return functions;
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)all.data();
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(all.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const Elf64_Sym *symbols = (const Elf64_Sym *)(all.data() + sections[i].sh_offset);
        const char *names = all.data() + sections[sections[i].sh_link].sh_offset;
        for (size_t k = 0; k < sections[i].sh_size / sizeof *symbols; k++)
            if (ELF64_ST_TYPE(symbols[k].st_info) == STT_FUNC)
                functions[symbols[k].st_value] = names + symbols[k].st_name;
    }
    return functions;
}

std::string without_arguments(const char *mangled) {
    int status;
    char *name = abi::__cxa_demangle(mangled, NULL, NULL, &status);
    std::string text = name ? name : mangled;
    free(name);
    text = text.substr(0, text.find_first_of("<("));
    return text.substr(text.rfind(' ') + 1);
}

} // namespace

std::string emulate_kernel_name(const void *function) {
    static std::map<const void *, std::string> known;
    static std::map<std::string, std::map<uintptr_t, std::string>> files;
    if (known.count(function)) return known[function];
    Dl_info info;
    if (!dladdr(function, &info)) return "unknown";
    const char *path = info.dli_fname;
    if (!files.count(path)) files[path] = read_functions(path);
    uintptr_t offset = (uintptr_t)function - (uintptr_t)info.dli_fbase;
    auto found = files[path].find(offset);
    return known[function] =
               found == files[path].end() ? "unknown" : without_arguments(found->second.c_str());
}

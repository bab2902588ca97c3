// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: functions of ours in the place of Unicorn's own.
//
// Its library binds its calls of its own exported functions by name, when it is loaded (ELF symbol interposition), and so the addresses
// of the translator's helpers. Each place where that was done is in its relocations; what stands there then is ours.
#pragma once
#include <elf.h>
#include <link.h>
#include "native.h"

static bool write_place(char *at, void *value) {
    char *page = (char *)((u64)at & ~0xfffull); // 8 bytes aligned: one page
    if (*(void **)at == value) return true;
    if (mprotect(page, 4096, PROT_READ | PROT_WRITE)) return false; // some are read-only after relocation
    *(void **)at = value;
    return true;
}

// Every reference by name in `lib` (from dlopen) leads to `ours` from now on; the number of them, or -1.
static int interpose(void *lib, const char *name, void *ours) {
    struct link_map *map;
    if (dlinfo(lib, RTLD_DI_LINKMAP, &map)) return -1;
    u64 tag[DT_JMPREL + 1] = {0};
    for (ElfW(Dyn) *d = map->l_ld; d->d_tag; d++)
        if (d->d_tag <= DT_JMPREL) tag[d->d_tag] = d->d_un.d_val;
    const ElfW(Sym) *symbols = (void *)tag[DT_SYMTAB];
    const char *strings = (void *)tag[DT_STRTAB];
    if (!symbols || !strings) return -1;
    struct { const ElfW(Rela) *rela; u64 size; } tables[] = {{(void *)tag[DT_RELA], tag[DT_RELASZ]}, {(void *)tag[DT_JMPREL], tag[DT_PLTRELSZ]}};
    int places = 0;
    for (int t = 0; t < 2; t++)
        for (u64 i = 0; tables[t].rela && i < tables[t].size / sizeof(ElfW(Rela)); i++) {
            const ElfW(Rela) *r = &tables[t].rela[i];
            if (!ELF64_R_SYM(r->r_info) || r->r_addend || strcmp(strings + symbols[ELF64_R_SYM(r->r_info)].st_name, name)) continue;
            if (!write_place((char *)map->l_addr + r->r_offset, ours)) return -1;
            places++;
        }
    return places;
}

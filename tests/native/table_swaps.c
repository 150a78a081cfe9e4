/* Two threads take the table in force into use and let it go again, as fast as they can, while the main thread puts
 * others in force: none is freed that is in use. The rare case of the real pump, which is busy with packets between,
 * is the usual one here; a sanitizer watches. Its arguments are the tables; prints how often each thread used one. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "ways.h"

#define SWAPS 20000
#define USES 100000 /* at least, of each thread */
#define TABLES 2
#define TABLE_MAX (1 << 20)

/* Looks at the whole table: its peers are sorted, or they are no table's any more. */
static void *use_tables(struct pump *pump, enum way way)
{
    struct direction *direction = &pump->ways[way];
    for (;;) {
        pump_may_read(pump, way);
        const struct table *table = batch_begin(pump, way);
        for (uint32_t i = 0; i < table->peer_count; i++)
            if (table_find_peer(table, table_peer(table, i).address_be) != i)
                abort();
        batch_end(pump, way);
        count(&direction->counts[COUNT_READS], 1);
    }
    return NULL;
}

void *send_loop(void *pump)
{
    return use_tables(pump, SEND);
}

void *receive_loop(void *pump)
{
    return use_tables(pump, RECEIVE);
}

static uint64_t uses(const struct pump *pump, enum way way)
{
    return atomic_load_explicit(&pump->ways[way].counts[COUNT_READS], memory_order_relaxed);
}

int main(int argc, char **argv)
{
    static struct pump pump;
    static uint8_t tables[TABLES][TABLE_MAX];
    size_t lengths[TABLES];
    if (argc != 1 + TABLES)
        return 2;
    for (int i = 0; i < TABLES; i++) {
        FILE *file = fopen(argv[1 + i], "rb");
        if (!file)
            return 2;
        lengths[i] = fread(tables[i], 1, TABLE_MAX, file);
        fclose(file);
    }
    for (unsigned turn = 0; turn < SWAPS || uses(&pump, SEND) < USES || uses(&pump, RECEIVE) < USES; turn++) {
        const char *wrong = pump_set_table(&pump, tables[turn % TABLES], lengths[turn % TABLES]);
        if (wrong) {
            fprintf(stderr, "%s\n", wrong);
            return 1;
        }
    }
    pump_park(&pump);
    pump_set_table(&pump, tables[0], lengths[0]); /* nobody uses the others now: they are freed */
    printf("%" PRIu64 " %" PRIu64 " %d\n", uses(&pump, SEND), uses(&pump, RECEIVE), pump.retired != NULL);
    return 0;
}
